//! The listening end of a control socket: the agent's, and the load balancer's.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::net::{UnixListener, UnixStream};

/// Listens; replaces the socket that an earlier run left. Only its owner may connect.
///
/// # Errors
/// The socket cannot be made.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    crate::files::remove(path)?;
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Has every client answered by a task of its own, until the process stops. Must be called on a
/// `LocalSet`.
pub async fn serve<A>(listener: UnixListener, converse: impl Fn(UnixStream) -> A)
where
    A: Future<Output = io::Result<()>> + 'static,
{
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let conversation = converse(stream);
                tokio::task::spawn_local(async move {
                    if let Err(error) = conversation.await {
                        tracing::debug!(%error, "a client went away");
                    }
                });
            }
            Err(error) => {
                // Too many open files, most likely; clients retry, and others will close theirs.
                tracing::warn!(%error, "cannot accept a client");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Whether a client is root, or who this process is. The mode of the socket says it already, but there is
/// a moment before it is set.
///
/// # Errors
/// The kernel does not say who it is.
pub fn may_ask(stream: &UnixStream) -> io::Result<bool> {
    let peer = stream.peer_cred()?.uid();
    Ok(peer == 0 || peer == rustix::process::geteuid().as_raw())
}

/// Whether a client still waits for its answer: it has not closed its end. If the kernel does not tell, it has not.
pub fn is_there(stream: &UnixStream) -> bool {
    let mut ends = [PollFd::new(stream, PollFlags::empty())];
    let told = poll(&mut ends, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    told.is_err() || !ends[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
}
