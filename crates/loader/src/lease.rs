//! Whether a file is being written, as the kernel knows it.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// Whether somebody has the file open for writing. `None`: nobody knows, because the file system has no leases, or
/// because the file is another user's and this process lacks CAP_LEASE.
///
/// A read lease is only given on a file that nobody writes (fcntl(2)); it is given back at once. Who opens the file
/// for writing in between waits for that moment. `file` must be open for reading only.
pub fn is_being_written(file: &File) -> Option<bool> {
    let file = file.as_fd();
    // A writer in that moment makes the kernel send a signal: by default SIGIO, which would end the process.
    if fcntl(file, F_SETSIG, libc::SIGURG) != 0 {
        return None;
    }
    if fcntl(file, libc::F_SETLEASE, libc::F_RDLCK) == 0 {
        fcntl(file, libc::F_SETLEASE, libc::F_UNLCK);
        return Some(false);
    }
    (std::io::Error::last_os_error().raw_os_error() == Some(libc::EAGAIN)).then_some(true)
}

/// fcntl.h; which signal says that a lease is being broken.
const F_SETSIG: libc::c_int = 10;

fn fcntl(file: BorrowedFd<'_>, command: libc::c_int, argument: libc::c_int) -> libc::c_int {
    // SAFETY: the commands above take a number, and the descriptor is open for as long as it is borrowed.
    unsafe { libc::fcntl(file.as_raw_fd(), command, argument) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_being_written_until_its_last_writer_closes_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let writers = [File::create(&path).unwrap(), File::options().append(true).open(&path).unwrap()];
        let reader = File::open(&path).unwrap();
        for writer in writers {
            assert_eq!(is_being_written(&reader), Some(true));
            drop(writer);
        }
        assert_eq!(is_being_written(&reader), Some(false));
        // And it was given back: nobody waits for it.
        drop(File::options().append(true).open(&path).unwrap());
    }
}
