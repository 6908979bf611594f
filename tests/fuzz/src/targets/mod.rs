//! The fuzzed parsers.

/// A parser of somebody else's bytes.
pub(crate) struct Target {
    pub(crate) name: &'static str,
    /// Inputs as they should be.
    pub(crate) seeds: fn() -> Vec<Vec<u8>>,
    /// Must not panic, whatever it is given.
    pub(crate) run: fn(&[u8]),
}

macro_rules! targets {
    ($($name:ident)*) => {
        $( mod $name; )*

        /// All of them.
        pub(crate) const TARGETS: &[Target] =
            &[$( Target { name: stringify!($name), seeds: $name::seeds, run: $name::run } ),*];

        #[cfg(test)]
        mod tests {
            $(
                #[test]
                fn $name() {
                    let target = super::TARGETS.iter().find(|target| target.name == stringify!($name)).unwrap();
                    let seed = crate::seed().unwrap();
                    if let Err(input) = crate::fuzz(target, 20_000, seed) {
                        panic!("{}={seed}: {}", crate::SEED, crate::hex(&input));
                    }
                }
            )*
        }
    };
}

// One line each, sorted.
targets! {
    command_line
    daemon_clock
    daemon_config
    daemon_ready
    daemon_record
    daemon_spec
    disk_image
    handshake
    initrd
    oci_spec
    relay_answers
    relay_args
    relay_events
    relay_frames
    relay_lines
    stdio
    storages
    streams
    uevents
}

/// Runs what waits for bytes, as the agent does: on one thread.
fn run_async(work: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build();
    if let Ok(runtime) = runtime {
        runtime.block_on(work);
    }
}
