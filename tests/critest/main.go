// A registry on the loopback interface with the images that the CRI validation suite asks for, made from busybox and
// nginx. It writes the digest of one image to standard output when it listens, and ends when its input does.
//
// usage: critest-registry --busybox FOLDER --nginx FOLDER --nnp FILE [--listen 127.0.0.1:5000]
package main

import (
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

func main() {
	var from sources
	listen := flag.String("listen", "127.0.0.1:5000", "address to listen at")
	flag.StringVar(&from.busybox, "busybox", "", "folder into which Debian's busybox is unpacked")
	flag.StringVar(&from.nginx, "nginx", "", "folder into which Debian's nginx is unpacked")
	flag.StringVar(&from.nnp, "nnp", "", "the program of the folder nnp")
	flag.Parse()
	log.SetFlags(0)
	if err := serve(*listen, from); err != nil {
		log.Fatalf("error: %v", err)
	}
}

func serve(address string, from sources) error {
	images, err := all(from)
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	handler := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	go func() { log.Fatalf("error: serving: %v", http.Serve(listener, handler)) }()
	for repository, image := range images {
		reference, err := name.NewTag(address+"/"+repository, name.Insecure)
		if err != nil {
			return err
		}
		if err := remote.Write(reference, image); err != nil {
			return fmt.Errorf("%s: %w", repository, err)
		}
	}
	digest, err := images[byDigest].Digest()
	if err != nil {
		return err
	}
	fmt.Printf("gcr.io/%s@%s\n", byDigest, digest)
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}
