//! Whether the packet path outlives the process, and the words for it.

use std::path::Path;

use cirri_loader::Datapath;

/// Warns if pins will not last; whether they will.
pub fn check(pin_root: &Path) -> bool {
    let lasting = !Datapath::pins_end_with_us(pin_root);
    if !lasting {
        tracing::warn!(
            pin_root = %pin_root.display(),
            "the BPF file system is mounted in this process's mount namespace alone: pins do not last, and the packet \
             path ends with this process; start it in the machine's mount namespace (`nsenter --net=FILE` instead of \
             `ip netns exec`), or mount one there before"
        );
    }
    lasting
}

/// The last line of a process that stops in good order.
pub fn tell_end(lasting: bool) {
    if lasting {
        tracing::info!("stopping; the packet path stays at work");
    } else {
        tracing::warn!("stopping, and the packet path with it: its pins are in this process's mount namespace alone");
    }
}
