//! SIGINT, SIGTERM and SIGHUP as a value, so that a command stops between two steps and can clean up.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::signal::unix::{SignalKind, signal};

use super::netns::block_on;

/// The command was interrupted by a signal.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// Tells whether a signal asked the command to stop.
#[derive(Clone, Debug)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Takes the signals over from the default of ending the process on the spot.
    ///
    /// # Errors
    /// No thread or no file descriptor left for it.
    pub fn install() -> anyhow::Result<Self> {
        let raised = Arc::new(AtomicBool::new(false));
        let raise = Arc::clone(&raised);
        let (ready, installed) = std::sync::mpsc::channel();
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            // An error of the runtime drops `ready`, which the caller sees.
            let _ = block_on(async move {
                let (Ok(mut int), Ok(mut term), Ok(mut hup)) =
                    (signal(SignalKind::interrupt()), signal(SignalKind::terminate()), signal(SignalKind::hangup()))
                else {
                    return;
                };
                let _ = ready.send(());
                loop {
                    tokio::select! {
                        _ = int.recv() => {}
                        _ = term.recv() => {}
                        _ = hup.recv() => {}
                    }
                    if raise.swap(true, Ordering::Relaxed) {
                        crate::output::complain("already stopping: cleaning up takes a moment");
                    }
                }
            });
        })?;
        installed.recv().map_err(|_| anyhow::anyhow!("cannot install signal handlers"))?;
        Ok(Self(raised))
    }

    /// Fails if a signal has come.
    ///
    /// # Errors
    /// [`Interrupted`].
    pub fn check(&self) -> Result<(), Interrupted> {
        if self.0.load(Ordering::Relaxed) { Err(Interrupted) } else { Ok(()) }
    }
}
