//! Readiness as systemd has it: a program finds a socket's path in `NOTIFY_SOCKET` and says `READY=1` there.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::interrupt::Interrupt;
use super::pods::quote;
use super::process::{self, ProcessId};
use crate::span;

/// How long a wait may keep an interruption waiting.
const INTERRUPT_CHECK: Duration = Duration::from_millis(100);
const READY: &[u8] = b"READY=1";

/// The socket that one program says it on. Its file goes with it.
pub struct Readiness {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Readiness {
    /// Listens at `path`.
    ///
    /// # Errors
    /// The socket cannot be made there.
    pub fn listen(path: PathBuf) -> anyhow::Result<Self> {
        let bind = || {
            crate::files::remove(&path)?;
            let socket = UnixDatagram::bind(&path)?;
            socket.set_nonblocking(true)?;
            Ok::<_, std::io::Error>(socket)
        };
        let socket = bind().with_context(|| format!("cannot listen on {}", path.display()))?;
        Ok(Self { socket, path })
    }

    /// What the program's environment must hold.
    pub fn env(&self) -> BTreeMap<String, String> {
        BTreeMap::from([("NOTIFY_SOCKET".to_owned(), self.path.display().to_string())])
    }

    /// Waits until the program `child`, called `name` in errors, says that it is ready.
    ///
    /// # Errors
    /// It ended, or is not ready in time; the error quotes its log. [`super::interrupt::Interrupted`].
    pub fn wait(
        &self,
        name: &str,
        child: &Child,
        log: &Path,
        limit: Duration,
        interrupt: &Interrupt,
    ) -> anyhow::Result<()> {
        let process = child.id().try_into().ok().and_then(ProcessId::current).and_then(ProcessId::open);
        let deadline = span::from_now(limit);
        while let Some(process) = &process {
            interrupt.check()?;
            match process::first_readable(&[self.socket.as_fd(), process.as_fd()], INTERRUPT_CHECK) {
                Some(0) if self.said_ready() => return Ok(()),
                Some(0) => {}
                Some(_) => break,
                None if Instant::now() >= deadline => {
                    bail!("{name} is not ready after {} s{}", limit.as_secs(), quote(log))
                }
                None => {}
            }
        }
        bail!("{name} ended at once{}", quote(log))
    }

    fn said_ready(&self) -> bool {
        let mut message = [0; 1024];
        let length = self.socket.recv(&mut message).unwrap_or_default();
        message[..length].split(|byte| *byte == b'\n').any(|line| line == READY)
    }
}

impl Drop for Readiness {
    fn drop(&mut self) {
        // What stays is replaced by the next one of its name.
        let _ = crate::files::remove(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn readiness_is_heard_among_other_words_and_an_end_without_it_is_an_error() {
        let path = std::env::temp_dir().join(format!("cirri-lab-ready-{}", std::process::id()));
        let interrupt = Interrupt::install().unwrap();
        let log = Path::new("/nonexistent");
        let readiness = Readiness::listen(path.clone()).unwrap();
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let program = UnixDatagram::unbound().unwrap();
        program.send_to(b"STATUS=starting", &readiness.env()["NOTIFY_SOCKET"]).unwrap();
        program.send_to(b"MAINPID=1\nREADY=1\n", &path).unwrap();
        readiness.wait("it", &child, log, Duration::from_secs(60), &interrupt).unwrap();
        child.kill().unwrap();
        let error = readiness.wait("it", &child, log, Duration::from_secs(60), &interrupt).unwrap_err().to_string();
        assert!(error.starts_with("it ended"), "{error}");
        child.wait().unwrap();
        drop(readiness);
        assert!(!path.exists());
    }
}
