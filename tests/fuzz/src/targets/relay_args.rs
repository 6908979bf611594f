//! The relay's command line: containerd's own, and what the daemon starts it with.

use kuasar_relay::args::{Action, parse};

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    [
        "-namespace k8s.io -address /run/containerd/containerd.sock -publish-binary /b -id c1 -bundle /b delete",
        "serve --pod-dir /run/p --guest hvsock:///run/p/vsock --address /c.sock --listen-fd 3 --vmm-pidfd=4 --forward-fd 5",
        "serve -pod-dir /p -guest vsock://3 -listen-fd 3",
        "-id c1 -debug start",
        "-info",
    ]
    .map(|line| line.as_bytes().to_vec())
    .to_vec()
}

pub(crate) fn run(input: &[u8]) {
    let line = String::from_utf8_lossy(input);
    match parse(line.split(' ').map(str::to_owned)) {
        // Standard input, output and error are none of those that it may take over.
        Ok(Action::Serve(serve)) => {
            assert!(serve.listen_fd >= 3);
            assert!([serve.vmm_pidfd, serve.forward_fd].iter().flatten().all(|fd| *fd >= 3));
        }
        Ok(_) => {}
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
