//! Rights of this process: fewer than it was started with, as it works on a guest's bytes.

use rustix::{
    io::Errno,
    process::{Resource, Rlimit, setrlimit},
    thread::{
        CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
        remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
    },
};

use crate::log::log;

/// To connect to mounted sockets, and to write to them, as the user in the container; to reach sockets that
/// belong to the user of a VMM, and to end one.
const KEPT: CapabilitySet = CapabilitySet::SETUID
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::KILL);

/// Gives up what is not needed, for good and for all threads that come: to be called while there is one. What
/// cannot be given up is said, and no reason not to serve: the pod would be worse off without a relay.
pub(crate) fn give_up() {
    let given_up = [
        ("gaining privileges", set_no_new_privs(true)),
        ("capabilities", give_up_capabilities()),
        // The token is in its memory.
        ("core dumps", setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })),
    ];
    for (what, result) in given_up {
        if let Err(e) = result {
            log!("giving up {what}: {e}");
        }
    }
}

fn give_up_capabilities() -> Result<(), Errno> {
    let has = capabilities(None)?.permitted;
    // Dropping from the bounding set is itself what only a capability allows.
    if has.contains(CapabilitySet::SETPCAP) {
        for number in 0..u64::BITS {
            let one = CapabilitySet::from_bits_retain(1 << number);
            if KEPT.contains(one) {
                continue;
            }
            match remove_capability_from_bounding_set(one) {
                Ok(()) => {}
                // The kernel has no more.
                Err(Errno::INVAL) => break,
                Err(e) => return Err(e),
            }
        }
    }
    clear_ambient_capability_set()?;
    let kept = has & KEPT;
    set_capabilities(
        None,
        CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() },
    )
}
