package main

import (
	"debug/elf"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"
)

// A program with the libraries that it needs: from the folder that it is unpacked into, or else the machine's.
func withLibraries(path, program, folder string) (layer, error) {
	found := make(map[string]string)
	if err := libraries(program, folder, found); err != nil {
		return nil, err
	}
	data, err := os.ReadFile(program)
	if err != nil {
		return nil, err
	}
	l := layer{file(path, 0o755, data)}
	names := make([]string, 0, len(found))
	for name := range found {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		if data, err = os.ReadFile(found[name]); err != nil {
			return nil, err
		}
		path := "lib/" + name
		if strings.HasPrefix(name, "/") {
			path = name[1:] // the loader, which is found by its path
		}
		l = append(l, file(path, 0o755, data))
	}
	return l, nil
}

// Collects by name the libraries of a program, those of its libraries, and the loader.
func libraries(path, folder string, found map[string]string) error {
	object, err := elf.Open(path)
	if err != nil {
		return err
	}
	defer object.Close()
	if section := object.Section(".interp"); section != nil {
		data, err := section.Data()
		if err != nil {
			return err
		}
		loader := strings.TrimRight(string(data), "\x00")
		found[loader] = loader
	}
	needed, err := object.ImportedLibraries()
	if err != nil {
		return err
	}
	for _, name := range needed {
		if _, known := found[name]; known {
			continue
		}
		library, err := find(name, folder)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		found[name] = library
		if err := libraries(library, folder, found); err != nil {
			return err
		}
	}
	return nil
}

func find(name, folder string) (string, error) {
	for _, root := range []string{folder, "/"} {
		for _, pattern := range []string{"lib/*-linux-gnu", "usr/lib/*-linux-gnu", "lib64", "lib"} {
			matches, err := filepath.Glob(filepath.Join(root, pattern, name))
			if err == nil && len(matches) > 0 {
				return matches[0], nil
			}
		}
	}
	return "", fmt.Errorf("no %s in %s or on this machine", name, folder)
}
