package main

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sort"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// Files that the images are made from.
type sources struct{ busybox, nginx, nnp string }

// What the suite calls and Debian's busybox does not have.
var scripts = map[string]string{
	"pgrep": `#!/bin/sh
for process in /proc/[0-9]*; do
  if read -r name <$process/comm; then case $name in *"$1"*) echo "${process#/proc/}" ;; esac; fi
done 2>/dev/null
`,
	"ipcs": "#!/bin/sh\nexec cat /proc/sysvipc/shm\n",
}

const (
	own      = "k8s-staging-cri-tools/"
	e2e      = "e2e-test-images/"
	byDigest = own + "test-image-digest"
)

const nginxConfig = `daemon off;
user nobody nogroup;
worker_processes 1;
pid /var/run/nginx.pid;
error_log /dev/stderr;
events { worker_connections 64; }
http {
  access_log off;
  client_body_temp_path /tmp/body;
  proxy_temp_path /tmp/proxy;
  fastcgi_temp_path /tmp/fastcgi;
  uwsgi_temp_path /tmp/uwsgi;
  scgi_temp_path /tmp/scgi;
  server { listen %d; root /www; }
}
`

const passwd = `root:x:0:0:root:/root:/bin/sh
www-data:x:33:33:www-data:/www:/bin/false
default-user:x:1000:1000::/home:/bin/sh
nobody:x:65534:65534:nobody:/:/bin/false
`

const group = `root:x:0:
www-data:x:33:
users:x:100:
default-user:x:1000:
group-defined-in-image:x:50000:default-user
nogroup:x:65534:
`

// All images by repository and tag, without the name of the registry: containerd asks us for every one.
func all(from sources) (map[string]v1.Image, error) {
	base, err := busyboxLayer(from.busybox)
	if err != nil {
		return nil, err
	}
	web, err := withLibraries("usr/sbin/nginx", filepath.Join(from.nginx, "usr/sbin/nginx"), from.nginx)
	if err != nil {
		return nil, err
	}
	nnp, err := os.ReadFile(from.nnp)
	if err != nil {
		return nil, err
	}
	nginx := []string{"/usr/sbin/nginx", "-e", "stderr", "-c", "/etc/nginx.conf"}
	page := file("www/index.html", 0o644, []byte("it works\n"))
	specs := []spec{
		{name: e2e + "busybox:1.29-2", layers: []layer{base}},
		{name: e2e + "nginx:1.14-2", command: nginx, layers: []layer{base, web, {page, config(80)}}},
		{name: own + "hostnet-nginx-" + runtime.GOARCH, command: nginx, layers: []layer{base, web, {page, config(12003)}}},
		// The suite looks for the word in the log.
		{name: e2e + "httpd:2.4.39-4", command: []string{"/bin/sh", "-c", "echo httpd; exec httpd -f -h /www"}, layers: []layer{base, {page}}},
		{name: e2e + "nonewprivs:1.3", command: []string{"/nnp"}, layers: []layer{base, {file("nnp", 0o4755, nnp)}}},
		{name: "pause:3.9", command: []string{"/bin/sleep", "2147483647"}, layers: []layer{base, marked("pause")}},
		{name: own + "test-image-user-uid", user: "1002", layers: []layer{base, marked("uid")}},
		{name: own + "test-image-user-username", user: "www-data", layers: []layer{base, marked("username")}},
		{name: own + "test-image-user-uid-group", user: "1003:users", layers: []layer{base, marked("uid-group")}},
		{name: own + "test-image-user-username-group", user: "www-data:100", layers: []layer{base, marked("username-group")}},
		{name: own + "test-image-predefined-group", user: "1000", layers: []layer{base, marked("predefined-group")}},
		{name: own + "test-image-latest", layers: []layer{base, marked("latest")}},
		{name: own + "test-image-tag:test", layers: []layer{base, marked("tag-test")}},
		{name: own + "test-image-tag:all", layers: []layer{base, marked("tag-all")}},
		{name: byDigest, layers: []layer{base, marked("digest")}},
	}
	for _, n := range []string{"1", "2", "3"} {
		specs = append(specs,
			spec{name: own + "test-image-" + n, layers: []layer{base, marked("image-" + n)}},
			spec{name: own + "test-image-tags:" + n, layers: []layer{base, marked("tags")}})
	}
	images := make(map[string]v1.Image)
	for _, spec := range specs {
		image, err := spec.build()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", spec.name, err)
		}
		images[spec.name] = image
	}
	return images, nil
}

func config(port int) entry {
	return file("etc/nginx.conf", 0o644, fmt.Appendf(nil, nginxConfig, port))
}

// Makes an image one of its own.
func marked(text string) layer { return layer{file("mark", 0o644, []byte(text))} }

type spec struct {
	name, user string
	command    []string
	layers     []layer
}

func (s spec) build() (v1.Image, error) {
	image := mutate.MediaType(empty.Image, "application/vnd.docker.distribution.manifest.v2+json")
	for _, l := range s.layers {
		packed, err := l.pack()
		if err != nil {
			return nil, err
		}
		if image, err = mutate.AppendLayers(image, packed); err != nil {
			return nil, err
		}
	}
	file, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	file = file.DeepCopy()
	file.OS, file.Architecture = "linux", runtime.GOARCH
	file.Config.Cmd, file.Config.User = s.command, s.user
	if len(s.command) == 0 {
		file.Config.Cmd = []string{"/bin/sh"}
	}
	file.Config.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	return mutate.ConfigFile(image, file)
}

type entry struct {
	header tar.Header
	data   []byte
}

// In the order in which they are unpacked.
type layer []entry

func file(path string, mode int64, data []byte) entry {
	return entry{tar.Header{Name: path, Typeflag: tar.TypeReg, Mode: mode, Size: int64(len(data))}, data}
}

func dir(path string, mode int64) entry {
	return entry{header: tar.Header{Name: path + "/", Typeflag: tar.TypeDir, Mode: mode}}
}

func hard(path, target string) entry {
	return entry{header: tar.Header{Name: path, Typeflag: tar.TypeLink, Mode: 0o755, Linkname: target}}
}

func (l layer) pack() (v1.Layer, error) {
	var buffer bytes.Buffer
	archive := tar.NewWriter(&buffer)
	for _, e := range l {
		if err := archive.WriteHeader(&e.header); err != nil {
			return nil, err
		}
		if _, err := archive.Write(e.data); err != nil {
			return nil, err
		}
	}
	if err := archive.Close(); err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(buffer.Bytes())), nil
	})
}

// The shell has to be one that looks for commands in PATH: a specification hides one of them. So it is Debian's
// ordinary busybox, with its libraries, and not the static one, whose shell knows all commands itself.
func busyboxLayer(folder string) (layer, error) {
	program := filepath.Join(folder, "bin/busybox")
	var l layer
	for _, path := range []string{"bin", "dev", "etc", "home", "lib", "lib64", "mnt", "proc", "sbin", "sys", "usr", "usr/bin", "usr/sbin", "var", "var/run", "www"} {
		l = append(l, dir(path, 0o755))
	}
	l = append(l, dir("root", 0o700), dir("tmp", 0o1777))
	files, err := withLibraries("bin/busybox", program, folder)
	if err != nil {
		return nil, err
	}
	l = append(l, files...)
	list, err := exec.Command(program, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("asking busybox for its applets: %w", err)
	}
	applets := strings.Fields(string(list))
	sort.Strings(applets)
	for _, applet := range applets {
		if applet != "busybox" {
			// Not a symbolic link: what hides one of them must not hide them all.
			l = append(l, hard("bin/"+applet, "bin/busybox"))
		}
	}
	for _, name := range []string{"ipcs", "pgrep"} {
		l = append(l, file("bin/"+name, 0o755, []byte(scripts[name])))
	}
	return append(l, file("etc/passwd", 0o644, []byte(passwd)), file("etc/group", 0o644, []byte(group))), nil
}
