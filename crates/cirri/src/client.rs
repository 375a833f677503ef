//! The command line's end of the agent's socket.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::api::{Answer, ApiError, Request};
use crate::exit::{Error, Failure, Result};

const AGENT_SOCKET: &str = "/run/cirri/agent.sock";

/// The environment's name for an agent's socket. It says nothing of a load balancer's.
const AGENT_SOCKET_VARIABLE: &str = "CIRRI_SOCKET";

/// How to find the agent.
#[derive(Clone, Debug, clap::Args)]
pub struct ClientArgs {
    /// The socket to ask; an agent's is else that of CIRRI_SOCKET, else /run/cirri/agent.sock
    #[arg(long, value_name = "PATH", global = true)]
    pub socket: Option<PathBuf>,
}

impl ClientArgs {
    /// The agent's socket.
    pub fn agent(&self) -> PathBuf {
        let variable = || std::env::var_os(AGENT_SOCKET_VARIABLE).filter(|path| !path.is_empty());
        self.socket.clone().or_else(|| variable().map(PathBuf::from)).unwrap_or_else(|| AGENT_SOCKET.into())
    }

    /// Asks once and reads the one answer.
    pub fn call<T: DeserializeOwned>(&self, method: &str, params: impl Serialize) -> Result<T> {
        let mut answer = None;
        self.stream(method, params, |value: T| {
            answer = Some(value);
            Ok(())
        })?;
        answer.ok_or_else(|| CallError::Stopped.into_exit(&self.agent()))
    }

    /// Asks once and reads answers until the agent closes the connection.
    pub fn stream<T: DeserializeOwned>(
        &self,
        method: &str,
        params: impl Serialize,
        mut each: impl FnMut(T) -> Result<()>,
    ) -> Result<()> {
        let socket = self.agent();
        let outcome = stream(&socket, method, &params, None, |value| match serde_json::from_value(value) {
            Ok(value) => each(value).map_err(CallError::Stop),
            Err(error) => Err(CallError::Garbled(error.to_string())),
        });
        outcome.map_err(|error| error.into_exit(&socket))
    }
}

/// Why a call to the agent did not work.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Nobody listens.
    #[error("no agent listens on {path}: {source}")]
    NoAgent {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The agent went away before it had answered.
    #[error("the agent stopped before it answered")]
    Stopped,
    /// The agent is there and has not answered in time.
    #[error("the agent is busy: no answer for {} s", .0.as_secs())]
    Busy(Duration),
    /// The connection broke.
    #[error("the connection to the agent broke: {0}")]
    Broken(std::io::Error),
    /// The agent refused.
    #[error("{0}")]
    Refused(ApiError),
    /// The answer is not what this version expects.
    #[error("the agent's answer cannot be read ({0}); are agent and command of the same version?")]
    Garbled(String),
    /// The reader of a stream had enough.
    #[error("{0}")]
    Stop(Error),
}

impl CallError {
    /// Whether nobody is there to answer, or whom he would have to ask is away.
    pub fn is_not_reachable(&self) -> bool {
        match self {
            CallError::NoAgent { .. } | CallError::Stopped => true,
            CallError::Refused(error) => error.code == "unavailable",
            _ => false,
        }
    }

    fn into_exit(self, socket: &Path) -> Error {
        match self {
            CallError::Stop(error) => error,
            CallError::NoAgent { .. } if let Some(pid) = runs_without(socket) => Error::new(
                Failure::NotReachable,
                format!("the agent runs (pid {pid}), but its socket {} is not there", socket.display()),
            )
            .hint(MADE_AGAIN),
            CallError::NoAgent { ref source, .. } if source.kind() == ErrorKind::PermissionDenied => {
                Error::new(Failure::NotReachable, format!("the agent's socket {} is for root alone", socket.display()))
                    .hint("run the command as root")
            }
            CallError::NoAgent { .. } => Error::new(Failure::NotReachable, &self).hint(format!(
                "start it with `cirri agent --config FILE`, or name its socket with --socket (tried {})",
                socket.display()
            )),
            CallError::Refused(error) => {
                let failure = match error.code.as_str() {
                    "bad-request" | "not-found" => Failure::BadInput,
                    "denied" => Failure::Denied,
                    "unavailable" => Failure::NotReachable,
                    _ => Failure::Failed,
                };
                let message = Error::new(failure, &error.message);
                if error.hint.is_empty() { message } else { message.hint(&error.hint) }
            }
            CallError::Stopped => Error::new(Failure::NotReachable, &self).hint("try again when it is back"),
            other => Error::new(Failure::Failed, other),
        }
    }
}

/// What to do about a socket that its process lost.
pub const MADE_AGAIN: &str = "it starts or stops, or somebody removed the socket, which it makes again within seconds: ask again; its log says why if it does not";

/// The process that has the lock beside a socket which is not there, as the kernel tells.
pub fn runs_without(socket: &Path) -> Option<u32> {
    if socket.exists() {
        return None;
    }
    let lock = std::fs::metadata(socket.with_extension("lock")).ok()?.ino();
    // `1: FLOCK  ADVISORY  WRITE 4711 00:1a:1234 0 EOF`: to try the lock could keep a start from it.
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    let holder = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let &[_, "FLOCK", _, "WRITE", pid, file, ..] = words.as_slice() else { return None };
        let inode: u64 = file.rsplit(':').next()?.parse().ok()?;
        pid.parse().ok().filter(|_| inode == lock)
    };
    locks.lines().find_map(holder)
}

/// One call: every answer line goes to `each`.
///
/// # Errors
/// See [`CallError`]. `timeout` bounds the silence between two lines.
pub fn stream(
    socket: &Path,
    method: &str,
    params: &impl Serialize,
    timeout: Option<Duration>,
    mut each: impl FnMut(serde_json::Value) -> std::result::Result<(), CallError>,
) -> std::result::Result<(), CallError> {
    let mut connection =
        UnixStream::connect(socket).map_err(|source| CallError::NoAgent { path: socket.to_owned(), source })?;
    let failed = |error: std::io::Error| match (error.kind(), timeout) {
        (ErrorKind::WouldBlock | ErrorKind::TimedOut, Some(timeout)) => CallError::Busy(timeout),
        (ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof, _) => CallError::Stopped,
        _ => CallError::Broken(error),
    };
    connection.set_read_timeout(timeout).map_err(failed)?;
    connection.set_write_timeout(timeout).map_err(failed)?;
    let params = serde_json::to_value(params).map_err(|error| CallError::Garbled(error.to_string()))?;
    let request = Request { method: method.to_owned(), params };
    let mut line = serde_json::to_vec(&request).map_err(|error| CallError::Garbled(error.to_string()))?;
    line.push(b'\n');
    // Who refuses a question for its length answers and hangs up before its end.
    let sent = match connection.write_all(&line).map_err(failed) {
        Err(error @ (CallError::Busy(_) | CallError::Broken(_))) => return Err(error),
        sent => sent,
    };
    let mut reader = BufReader::new(connection);
    loop {
        let mut line = Vec::new();
        match reader.read_until(b'\n', &mut line).map_err(failed)? {
            0 => return sent,
            // A line without its end: whoever wrote it is gone.
            _ if line.pop() != Some(b'\n') => return Err(CallError::Stopped),
            _ => {}
        }
        match serde_json::from_slice(&line).map_err(|error| CallError::Garbled(error.to_string()))? {
            Answer::Result(value) => each(value)?,
            Answer::Error(error) => return Err(CallError::Refused(error)),
        }
    }
}

/// One call with one answer; for those who need to tell the failures apart.
///
/// # Errors
/// See [`CallError`].
pub fn call<T: DeserializeOwned>(
    socket: &Path,
    method: &str,
    params: &impl Serialize,
    timeout: Duration,
) -> std::result::Result<T, CallError> {
    let mut answer = None;
    stream(socket, method, params, Some(timeout), |value| {
        answer = Some(value);
        Ok(())
    })?;
    let value = answer.ok_or(CallError::Stopped)?;
    serde_json::from_value(value).map_err(|error| CallError::Garbled(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// What a call says of an agent that answers this and hangs up; of one that stays, if `holds`.
    fn call_to(name: &str, answer: &'static str, holds: bool) -> CallError {
        let socket = std::env::temp_dir().join(format!("cirri-client-{name}-{}", std::process::id()));
        let listener = UnixListener::bind(&socket).unwrap();
        let agent = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut question = String::new();
            BufReader::new(stream.try_clone().unwrap()).read_line(&mut question).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
            holds.then_some(stream)
        });
        let outcome = call::<u32>(&socket, "m", &serde_json::json!({}), Duration::from_millis(200));
        drop(agent.join());
        std::fs::remove_file(&socket).unwrap();
        outcome.unwrap_err()
    }

    #[test]
    fn a_refusal_before_the_end_of_the_question_is_heard() {
        let socket = std::env::temp_dir().join(format!("cirri-client-long-{}", std::process::id()));
        let listener = UnixListener::bind(&socket).unwrap();
        let agent = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"{\"error\": {\"code\": \"bad-request\", \"message\": \"too long\"}}\n").unwrap();
        });
        let outcome = call::<u32>(&socket, "m", &"x".repeat(4 << 20), Duration::from_secs(10));
        agent.join().unwrap();
        std::fs::remove_file(&socket).unwrap();
        assert!(matches!(outcome, Err(CallError::Refused(ref error)) if error.message == "too long"), "{outcome:?}");
    }

    #[test]
    fn an_agent_that_stopped_one_that_is_busy_and_one_of_another_version_are_told_apart() {
        assert!(matches!(call_to("gone", "", false), CallError::Stopped));
        assert!(matches!(call_to("half", "{\"result\":", false), CallError::Stopped));
        assert!(matches!(call_to("busy", "", true), CallError::Busy(_)));
        assert!(matches!(call_to("other", "hello\n", false), CallError::Garbled(_)));
    }
}
