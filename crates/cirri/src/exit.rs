//! What the exit code says.

use std::fmt;
use std::process::ExitCode;

/// Why a command did not succeed; the number is the process's exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// It was tried and did not work.
    Failed = 1,
    /// The command line, a file or a manifest is wrong.
    BadInput = 2,
    /// The agent or the store cannot be reached.
    NotReachable = 3,
    /// The question was answered, and the answer is no: a probe denied or unanswered, a verdict of deny.
    Denied = 4,
}

/// Table of exit codes for `--help`.
pub const HELP: &str = "Exit codes:\n  \
    0  done\n  \
    1  tried and failed\n  \
    2  wrong command line, file or manifest\n  \
    3  agent or store not reachable\n  \
    4  answered with no: a probe or a verdict was denied";

/// An error on its way out of a command: what happened, what to do next, and the exit code.
#[derive(Debug)]
pub struct Error {
    /// The exit code.
    pub failure: Failure,
    message: String,
    hint: Option<String>,
}

/// What commands answer.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// What happened, and the exit code for it.
    pub fn new(failure: Failure, message: impl fmt::Display) -> Error {
        Error { failure, message: message.to_string(), hint: None }
    }

    /// Adds what to do next.
    pub fn hint(mut self, hint: impl fmt::Display) -> Error {
        self.hint = Some(hint.to_string());
        self
    }

    /// Prints it on standard error and gives the exit code.
    pub fn report(&self) -> ExitCode {
        crate::output::complain(&self.to_string());
        ExitCode::from(self.failure as u8)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match &self.hint {
            Some(hint) => write!(f, "\n  {hint}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {}

/// Gives an error an exit code on its way out.
pub trait Because<T> {
    /// With this exit code.
    fn because(self, failure: Failure) -> Result<T>;
}

impl<T, E: fmt::Display> Because<T> for std::result::Result<T, E> {
    fn because(self, failure: Failure) -> Result<T> {
        self.map_err(|error| Error::new(failure, error))
    }
}
