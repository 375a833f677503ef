//! Running other programs: output streamed, interruptions passed on, failures named.

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::ffi::OsString;
use std::io::{BufRead, BufReader, IsTerminal};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Steps that are known to come, and those that began.
static EXPECTED: AtomicUsize = AtomicUsize::new(0);
static DONE: AtomicUsize = AtomicUsize::new(0);
static BEGUN: OnceLock<Instant> = OnceLock::new();
static INTERRUPTED: AtomicBool = AtomicBool::new(false);
/// The programs being waited for.
static CHILDREN: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

/// From here on Ctrl-C, SIGTERM and a terminal that hangs up end the children, and this process only after them, so that
/// guards on both sides can clean up. The terminal sends the others to the children by itself; SIGTERM comes to this
/// process alone and is passed on.
pub fn catch_interrupts() {
    let Ok(mut signals) = signal_hook::iterator::Signals::new([SIGHUP, SIGINT, SIGTERM]) else {
        return; // Signals then end this process at once, as they would by default.
    };
    std::thread::spawn(move || {
        for signal in signals.forever() {
            INTERRUPTED.store(true, Ordering::SeqCst);
            let children = children();
            if children.is_empty() {
                std::process::exit(130);
            }
            for child in children.iter().filter(|_| signal == SIGTERM) {
                // It may have ended in between; then there is nothing to pass on.
                let _ = kill_process(*child, Signal::TERM);
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

/// Runs a program beside others: what it prints goes to a file, and is shown in one piece and handed out when it has
/// ended. No pipe: what it left running could hold that open for ever.
pub fn in_one_piece(command: &mut Command, log: &Path) -> Result<(ExitStatus, String)> {
    let place = || format!("cannot use {}", log.display());
    let file = std::fs::File::create(log).with_context(place)?;
    let status = status(command.stdout(file.try_clone().with_context(place)?).stderr(file))?;
    let text = String::from_utf8_lossy(&std::fs::read(log).with_context(place)?).into_owned();
    print!("{text}");
    Ok((status, text))
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

fn wait(command: &mut Command, meanwhile: impl FnOnce(&mut Child)) -> Result<ExitStatus> {
    let mut running = Running::start(command)?;
    meanwhile(&mut running.child);
    running.wait()
}

/// A program that is told of interruptions.
struct Running {
    child: Child,
    line: String,
}

impl Running {
    fn start(command: &mut Command) -> Result<Running> {
        // With the lock: an interruption comes before it starts, or finds it.
        let mut all = children();
        if interrupted() {
            bail!("interrupted");
        }
        let line = line(command);
        let child = command.spawn().with_context(|| format!("cannot start `{line}`"))?;
        all.extend(Pid::from_raw(child.id().cast_signed()));
        Ok(Running { child, line })
    }

    fn wait(&mut self) -> Result<ExitStatus> {
        let status = self.child.wait().with_context(|| format!("lost sight of `{}`", self.line));
        let pid = Pid::from_child(&self.child);
        children().retain(|child| *child != pid);
        if interrupted() {
            bail!("interrupted");
        }
        status
    }
}

fn children() -> MutexGuard<'static, Vec<Pid>> {
    CHILDREN.lock().unwrap_or_else(PoisonError::into_inner)
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
    fn what_is_run_beside_others_is_handed_out_whole() {
        let log = std::env::temp_dir().join(format!("cirri-in-one-piece-{}", std::process::id()));
        let mut command = Command::new("sh");
        command.args(["-c", "echo one; echo two >&2; printf three; exit 3"]);
        let (status, text) = in_one_piece(&mut command, &log).unwrap();
        std::fs::remove_file(log).unwrap();
        assert_eq!((status.code(), text.as_str()), (Some(3), "one\ntwo\nthree"));
    }

    #[test]
    fn each_line_is_seen_even_without_a_last_newline_or_utf8() {
        let mut seen = Vec::new();
        let status = stream(Command::new("printf").arg("one\\ntwo\\377"), |l| seen.push(l.to_owned())).unwrap();
        assert!(status.success());
        assert_eq!(seen, ["one", "two\u{fffd}"]);
    }
}
