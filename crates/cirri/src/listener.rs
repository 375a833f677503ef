//! The listening end of a control socket: the agent's, and the load balancer's.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Notify;

use crate::agent::{Finding, Findings, Instead, OpenFile};
use crate::api::{ApiError, ProblemKind, Request};

/// A socket at the path where clients look for it. Whoever removes it there locks all of them out, so it is looked at
/// now and then, and made again.
#[derive(Debug)]
pub struct ServerSocket {
    path: PathBuf,
    made: Mutex<Made>,
    again: Notify,
}

#[derive(Debug)]
struct Made {
    file: OpenFile,
    /// The listening end, until somebody serves it.
    listener: Option<UnixListener>,
}

impl ServerSocket {
    /// Listens; replaces the socket that an earlier run left. Only its owner may connect.
    ///
    /// # Errors
    /// The socket cannot be made; names it.
    pub fn open(path: PathBuf) -> io::Result<Arc<ServerSocket>> {
        let wrong =
            |error: io::Error| io::Error::new(error.kind(), format!("cannot listen on {}: {error}", path.display()));
        let made = make(&path).map_err(wrong)?;
        Ok(Arc::new(ServerSocket { path, made: Mutex::new(made), again: Notify::new() }))
    }

    /// Makes the socket again if it is not at its path any more. `ask`: whether that may be done now, see
    /// [`crate::agent::Repairs::ask`].
    pub fn look(&self, mut ask: impl FnMut(&str, [&str; 2]) -> bool, findings: &mut Findings) {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(found) = made.file.replaced().map(Instead::words) else { return };
        let (object, wanted) = (self.path.display().to_string(), "the socket that clients ask");
        if !ask(&object, [found, wanted]) {
            return;
        }
        match make(&self.path) {
            Ok(again) => {
                *made = again;
                self.again.notify_one();
            }
            Err(error) => {
                let finding = Finding::new(format!("{found}; it cannot be made again: {error}"), "make room for it");
                findings.push((ProblemKind::File, object, finding.wanted(wanted)));
            }
        }
    }

    /// Removes the socket.
    ///
    /// # Errors
    /// The file system's.
    pub fn close(&self) -> io::Result<()> {
        crate::files::remove(&self.path)
    }

    /// The listening end, once after it was made.
    fn listener(&self) -> Option<UnixListener> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner).listener.take()
    }
}

fn make(path: &Path) -> io::Result<Made> {
    // The directory may have gone with the socket.
    path.parent().map_or(Ok(()), std::fs::create_dir_all)?;
    crate::files::remove(path)?;
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(Made { file: OpenFile::at(path.to_owned())?, listener: Some(listener) })
}

/// Has every client answered by a task of its own, until the process stops. Must be called on a
/// `LocalSet`.
pub async fn serve<A>(server_socket: Arc<ServerSocket>, converse: impl Fn(UnixStream) -> A)
where
    A: Future<Output = io::Result<()>> + 'static,
{
    let Some(mut listener) = server_socket.listener() else { return };
    loop {
        let client = tokio::select! {
            client = listener.accept() => client,
            () = server_socket.again.notified() => {
                listener = server_socket.listener().unwrap_or(listener);
                continue;
            }
        };
        match client {
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

/// Reads a client's question: one line, of which no more than `longest` bytes are looked at. The inner error is what
/// the client is told.
///
/// # Errors
/// The client went away.
pub async fn question(reader: &mut (impl AsyncBufRead + Unpin), longest: u64) -> io::Result<Result<Request, ApiError>> {
    let mut line = String::new();
    reader.take(longest).read_line(&mut line).await?;
    if line.len() as u64 == longest && !line.ends_with('\n') {
        let limit = format!("the question is longer than {} MiB", longest >> 20);
        return Ok(Err(ApiError::new("bad-request", limit)));
    }
    Ok(serde_json::from_str(&line)
        .map_err(|error| ApiError::new("bad-request", format!("the question cannot be read: {error}"))))
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

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::Shutdown;

    use tokio::io::{AsyncWriteExt, BufReader};

    use super::*;

    const LONGEST: u64 = 2 << 20;

    /// Answers a question with its method, or with what is wrong with it.
    async fn converse(stream: UnixStream) -> io::Result<()> {
        let (reader, mut writer) = stream.into_split();
        let answer = match question(&mut BufReader::new(reader), LONGEST).await? {
            Ok(request) => request.method,
            Err(error) => format!("{}: {}", error.code, error.message),
        };
        writer.write_all(answer.as_bytes()).await
    }

    fn ask(socket: &Path, question: &[u8]) -> String {
        let mut stream = std::os::unix::net::UnixStream::connect(socket).unwrap();
        // Who is refused has perhaps hung up before the last byte.
        let _ = stream.write_all(question).and_then(|()| stream.shutdown(Shutdown::Write));
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8(answer).unwrap()
    }

    #[test]
    fn a_question_that_is_too_long_is_refused_with_the_limit_and_the_next_is_answered() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let padded = |length: u64| {
            let question = r#"{"method":"status"}"#;
            [question, &" ".repeat(length as usize - question.len() - 1), "\n"].concat()
        };
        let client = {
            let socket = socket.clone();
            move || [LONGEST + 1, 4 * LONGEST, LONGEST, 100].map(|length| ask(&socket, padded(length).as_bytes()))
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let answers = tokio::task::LocalSet::new().block_on(&runtime, async {
            let server_socket = ServerSocket::open(socket).unwrap();
            tokio::select! {
                () = serve(server_socket, converse) => unreachable!("it serves for ever"),
                answers = tokio::task::spawn_blocking(client) => answers.unwrap(),
            }
        });
        let refused = "bad-request: the question is longer than 2 MiB";
        assert_eq!(answers, [refused, refused, "status", "status"]);
    }
    #[test]
    fn a_socket_that_was_removed_or_replaced_is_made_again_and_answers() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("state/socket");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        tokio::task::LocalSet::new().block_on(&runtime, async {
            let server_socket = ServerSocket::open(socket.clone()).unwrap();
            let served = tokio::task::spawn_local(serve(Arc::clone(&server_socket), converse));
            let (mut asked, mut findings) = (Vec::new(), Findings::new());
            for damage in ["nothing", "removed", "replaced", "directory"] {
                match damage {
                    "removed" => std::fs::remove_file(&socket).unwrap(),
                    "replaced" => {
                        std::fs::remove_file(&socket).unwrap();
                        std::fs::write(&socket, "").unwrap();
                    }
                    "directory" => std::fs::remove_dir_all(socket.parent().unwrap()).unwrap(),
                    _ => {}
                }
                let ask = |_: &str, [found, _]: [&str; 2]| {
                    asked.push(found.to_owned());
                    true
                };
                server_socket.look(ask, &mut findings);
                let at = socket.clone();
                let answer = tokio::task::spawn_blocking(move || super::tests::ask(&at, b"{\"method\":\"status\"}\n"));
                assert_eq!(answer.await.unwrap(), "status", "{damage}");
            }
            let found = ["it was removed", "another file stands in its place", "it was removed"];
            assert_eq!((asked, findings), (found.map(str::to_owned).to_vec(), Findings::new()));
            served.abort();
        });
    }
}
