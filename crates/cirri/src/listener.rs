//! The listening end of a control socket: the agent's, and the load balancer's.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt};
use tokio::net::{UnixListener, UnixStream};

use crate::api::{ApiError, Request};

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
            let listener = listen(&socket).unwrap();
            tokio::select! {
                () = serve(listener, converse) => unreachable!("it serves for ever"),
                answers = tokio::task::spawn_blocking(client) => answers.unwrap(),
            }
        });
        let refused = "bad-request: the question is longer than 2 MiB";
        assert_eq!(answers, [refused, refused, "status", "status"]);
    }
}
