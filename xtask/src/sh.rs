//! Running other programs: output streamed, interruptions passed on, failures named.

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGINT, SIGTERM};
use std::ffi::OsString;
use std::io::{BufRead, BufReader, IsTerminal};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Steps that are known to come, and those that began.
static EXPECTED: AtomicUsize = AtomicUsize::new(0);
static DONE: AtomicUsize = AtomicUsize::new(0);
static BEGUN: OnceLock<Instant> = OnceLock::new();
static INTERRUPTED: AtomicBool = AtomicBool::new(false);
/// Process id of the program being waited for; 0 is none.
static CHILD: AtomicI32 = AtomicI32::new(0);

/// From here on Ctrl-C and SIGTERM end the child, and this process only after it, so that guards
/// on both sides can clean up. The terminal sends Ctrl-C to the child by itself; SIGTERM comes to
/// this process alone and is passed on.
pub fn catch_interrupts() {
    let Ok(mut signals) = signal_hook::iterator::Signals::new([SIGINT, SIGTERM]) else {
        return; // Signals then end this process at once, as they would by default.
    };
    std::thread::spawn(move || {
        for signal in signals.forever() {
            INTERRUPTED.store(true, Ordering::SeqCst);
            let child = Pid::from_raw(CHILD.load(Ordering::SeqCst));
            match child {
                Some(child) if signal == SIGTERM => {
                    // The child may have ended in between; then there is nothing to pass on.
                    let _ = kill_process(child, Signal::TERM);
                }
                Some(_) => {}
                None => std::process::exit(130),
            }
        }
    });
}

pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// Runs a program with this terminal as its own. Fails when it fails.
pub fn run(command: &mut Command) -> Result<()> {
    let status = status(command)?;
    if !status.success() {
        bail!("`{}` failed ({status})", line(command));
    }
    Ok(())
}

/// Like [`run`], but a failure is an answer and not an error.
pub fn status(command: &mut Command) -> Result<ExitStatus> {
    wait(command, |_| ())
}

/// Runs a program, shows each line of its standard output and hands it to `each` as well.
pub fn stream(command: &mut Command, mut each: impl FnMut(&str)) -> Result<ExitStatus> {
    wait(command.stdout(Stdio::piped()), |child| {
        let Some(stdout) = child.stdout.take() else { return };
        let mut reader = BufReader::new(stdout);
        let mut bytes = Vec::new();
        // A test may print what is no text; it is shown as well as it can be.
        while reader.read_until(b'\n', &mut bytes).is_ok_and(|n| n > 0) {
            let text = String::from_utf8_lossy(&bytes);
            print!("{text}");
            each(text.trim_end());
            bytes.clear();
        }
    })
}

/// The standard output of a program that answers a question. Fails when it fails.
pub fn capture(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start `{}`", line(command)))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`{}` failed ({}): {}", line(command), output.status, said.trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("`{}` printed what is no UTF-8", line(command)))
}

/// Becomes the program, so that every signal is its own. Returns only when it cannot be started.
pub fn exec(command: &mut Command) -> Result<()> {
    if interrupted() {
        bail!("interrupted");
    }
    let error = command.exec();
    Err(error).with_context(|| format!("cannot start `{}`", line(command)))
}

/// What a person would type to run this.
pub fn line(command: &Command) -> String {
    let words: Vec<OsString> =
        std::iter::once(command.get_program()).chain(command.get_args()).map(OsString::from).collect();
    words.iter().map(|w| w.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Says that so many more steps are to come.
pub fn expect(steps: usize) {
    EXPECTED.fetch_add(steps, Ordering::Relaxed);
    BEGUN.get_or_init(Instant::now);
}

/// Says what begins: `==> [2 of 5, 1:07] …` if it is known how many steps there are.
pub fn step(text: &str) {
    let (done, expected) = (DONE.fetch_add(1, Ordering::Relaxed) + 1, EXPECTED.load(Ordering::Relaxed));
    let place = if done <= expected {
        format!("[{done} of {expected}, {}] ", clock(BEGUN.get_or_init(Instant::now).elapsed()))
    } else {
        String::new()
    };
    eprintln!("{} {place}{text}", bold("==>"));
}

/// Minutes and seconds.
pub fn clock(time: Duration) -> String {
    format!("{}:{:02}", time.as_secs() / 60, time.as_secs() % 60)
}

pub fn bold(text: &str) -> String {
    paint("1", text)
}

pub fn red(text: &str) -> String {
    paint("31;1", text)
}

fn wait(command: &mut Command, meanwhile: impl FnOnce(&mut std::process::Child)) -> Result<ExitStatus> {
    if interrupted() {
        bail!("interrupted");
    }
    let mut child = command.spawn().with_context(|| format!("cannot start `{}`", line(command)))?;
    CHILD.store(child.id().cast_signed(), Ordering::SeqCst);
    meanwhile(&mut child);
    let status = child.wait().with_context(|| format!("lost sight of `{}`", line(command)));
    CHILD.store(0, Ordering::SeqCst);
    if interrupted() {
        bail!("interrupted");
    }
    status
}

fn paint(code: &str, text: &str) -> String {
    if std::io::stderr().is_terminal() && std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() {
        format!("\x1b[{code}m{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_the_command_and_what_it_said() {
        let error = capture(Command::new("sh").args(["-c", "echo broken >&2; exit 3"])).unwrap_err().to_string();
        assert!(error.contains("sh -c") && error.contains("broken") && error.contains('3'), "{error}");
    }

    #[test]
    fn each_line_is_seen_even_without_a_last_newline_or_utf8() {
        let mut seen = Vec::new();
        let status = stream(Command::new("printf").arg("one\\ntwo\\377"), |l| seen.push(l.to_owned())).unwrap();
        assert!(status.success());
        assert_eq!(seen, ["one", "two\u{fffd}"]);
    }
}
