// A client of containerd's Streaming service, made of containerd's own packages: what the agent's server must get along with.
//
// usage: streaming-client SOCKET STREAM-ID in|out
// "in" sends standard input to the stream and ends it; "out" prints the stream up to its end.
package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"

	streamapi "github.com/containerd/containerd/api/services/streaming/v1"
	"github.com/containerd/containerd/v2/core/streaming/proxy"
	"github.com/containerd/containerd/v2/core/transfer/streaming"
	"github.com/containerd/ttrpc"
)

func run(socket, id, direction string) error {
	connection, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	client := ttrpc.NewClient(connection)
	ctx := context.Background()
	stream, err := proxy.NewStreamCreator(streamapi.NewTTRPCStreamingClient(client)).Create(ctx, id)
	if err != nil {
		return fmt.Errorf("opening stream %s: %w", id, err)
	}
	if direction == "out" {
		_, err := io.Copy(os.Stdout, streaming.ReadByteStream(ctx, stream))
		return err
	}
	writer := streaming.WriteByteStream(ctx, stream)
	if _, err := io.Copy(writer, os.Stdin); err != nil {
		return err
	}
	return writer.Close()
}

func main() {
	if len(os.Args) != 4 {
		fmt.Fprintln(os.Stderr, "usage: streaming-client SOCKET STREAM-ID in|out")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2], os.Args[3]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
