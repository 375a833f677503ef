//! The command line's end of the agent's socket.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::api::{Answer, ApiError, Request};
use crate::exit::{Error, Failure, Result};

const AGENT_SOCKET: &str = "/run/cirri/agent.sock";

/// How to find the agent.
#[derive(Clone, Debug, clap::Args)]
pub struct ClientArgs {
    /// The agent's socket.
    #[arg(long, env = "CIRRI_SOCKET", default_value = AGENT_SOCKET, value_name = "PATH", global = true)]
    pub socket: PathBuf,
}

impl ClientArgs {
    /// Whether nobody named a socket.
    pub fn is_default(&self) -> bool {
        self.socket.as_os_str() == AGENT_SOCKET
    }

    /// Asks once and reads the one answer.
    pub fn call<T: DeserializeOwned>(&self, method: &str, params: impl Serialize) -> Result<T> {
        let mut answer = None;
        self.stream(method, params, |value: T| {
            answer = Some(value);
            Ok(())
        })?;
        answer.ok_or_else(|| Error::new(Failure::Failed, format!("the agent gave no answer to `{method}`")))
    }

    /// Asks once and reads answers until the agent closes the connection.
    pub fn stream<T: DeserializeOwned>(
        &self,
        method: &str,
        params: impl Serialize,
        mut each: impl FnMut(T) -> Result<()>,
    ) -> Result<()> {
        let outcome = stream(&self.socket, method, &params, None, |value| match serde_json::from_value(value) {
            Ok(value) => each(value).map_err(CallError::Stop),
            Err(error) => Err(CallError::Garbled(error.to_string())),
        });
        outcome.map_err(|error| error.into_exit(&self.socket))
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
    /// The connection broke.
    #[error("the connection to the agent broke: {0}")]
    Broken(#[from] std::io::Error),
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
    fn into_exit(self, socket: &Path) -> Error {
        match self {
            CallError::Stop(error) => error,
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
            other => Error::new(Failure::Failed, other),
        }
    }
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
    connection.set_read_timeout(timeout)?;
    let params = serde_json::to_value(params).map_err(|error| CallError::Garbled(error.to_string()))?;
    let request = Request { method: method.to_owned(), params };
    let mut line = serde_json::to_vec(&request).map_err(|error| CallError::Garbled(error.to_string()))?;
    line.push(b'\n');
    connection.write_all(&line)?;
    for line in BufReader::new(connection).lines() {
        match serde_json::from_str(&line?).map_err(|error| CallError::Garbled(error.to_string()))? {
            Answer::Result(value) => each(value)?,
            Answer::Error(error) => return Err(CallError::Refused(error)),
        }
    }
    Ok(())
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
    let value = answer.ok_or_else(|| CallError::Garbled("no answer".to_owned()))?;
    serde_json::from_value(value).map_err(|error| CallError::Garbled(error.to_string()))
}
