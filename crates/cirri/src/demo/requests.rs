//! Requests to services, made by `curl` inside pods: each on a new connection, with who answered it.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::traffic::seconds;
use crate::lab::interrupt::Interrupt;
use crate::lab::{netns, process};

/// What `curl` says of a request, on one line of its standard error, which it does not buffer. A text that may hold
/// anything comes last.
const REPORT: &str = "%{stderr}%{exitcode}|%{time_total}|%header{served-by}|%header{seen-client}|%{errormsg}\\n";
/// How fast requests follow one another in a stream.
const RATE: &str = "200/s";
/// More requests than any stream makes.
const ENDLESS: usize = 1_000_000;
/// How often a wait for requests looks for an interruption.
const SLICE: Duration = Duration::from_millis(100);
/// `curl` could not connect.
const COULD_NOT_CONNECT: i32 = 7;
/// `curl` waited in vain.
const TIMED_OUT: i32 = 28;

/// Who asks, and what.
#[derive(Clone, Debug)]
pub struct Asker {
    /// As `front/ui`, or `world`.
    pub name: String,
    /// Its network namespace.
    pub netns: PathBuf,
    /// Its control group.
    pub group: PathBuf,
    /// The service's address.
    pub to: SocketAddr,
}

impl Asker {
    fn in_words(&self) -> Arc<str> {
        format!("{} → {}", self.name, self.to).into()
    }
}

/// What came of one request.
#[derive(Clone, Debug)]
pub struct Request {
    /// Who asked whom, in words.
    pub who: Arc<str>,
    /// It did not begin before this moment. When it did, `curl` does not say, and who reads it may come late.
    pub not_before: Instant,
    /// How long it took.
    pub took: Duration,
    /// Who served it, as whose client; or why it failed.
    pub outcome: Result<Answer, Failed>,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The replica's name.
    pub by: String,
    /// The address that the replica saw.
    pub client: IpAddr,
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failed {
    /// `curl`'s exit code.
    code: i32,
    /// `curl`'s words.
    why: String,
}

impl Failed {
    /// Whether the connection was refused, rather than cut off or left without an answer.
    pub fn refused(&self) -> bool {
        self.code == COULD_NOT_CONNECT
    }

    /// Whether there was only silence.
    pub fn silent(&self) -> bool {
        self.code == TIMED_OUT
    }
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "curl: ({}) {}", self.code, self.why)
    }
}

/// Makes so many requests, one after the other, each of which may take so long.
///
/// # Errors
/// `curl` cannot be started there, or says something else than it was told to.
pub fn ask(asker: &Asker, count: usize, patience: Duration) -> anyhow::Result<Vec<Request>> {
    let who = asker.in_words();
    let (mut child, report) = curl(asker, count, patience, false)?;
    let requests: anyhow::Result<Vec<Request>> = report.requests(who.clone()).collect();
    child.wait()?;
    let requests = requests.with_context(|| who.to_string())?;
    if requests.len() != count {
        bail!("{who}: curl made {} of {count} requests", requests.len());
    }
    Ok(requests)
}

/// Steady requests of several clients at once, a few hundred a second each, until dropped.
#[derive(Debug)]
pub struct Streams {
    clients: Vec<Child>,
    readers: Vec<JoinHandle<()>>,
    incoming: Receiver<(usize, anyhow::Result<Request>)>,
    requests: Vec<Request>,
    patience: Duration,
}

impl Streams {
    /// Starts them; a request may take so long.
    ///
    /// # Errors
    /// `curl` cannot be started there.
    pub fn start(askers: &[Asker], patience: Duration) -> anyhow::Result<Self> {
        let (sender, incoming) = channel();
        let mut streams = Self { clients: Vec::new(), readers: Vec::new(), incoming, requests: Vec::new(), patience };
        for (index, asker) in askers.iter().enumerate() {
            let (client, report) = curl(asker, ENDLESS, patience, true)?;
            streams.clients.push(client);
            let (sender, who) = (sender.clone(), asker.in_words());
            streams.readers.push(std::thread::spawn(move || {
                for request in report.requests(who) {
                    // Nobody listens any more: the streams are being dropped.
                    if sender.send((index, request)).is_err() {
                        return;
                    }
                }
            }));
        }
        Ok(streams)
    }

    /// Waits until each client has begun and ended so many requests from now on.
    ///
    /// # Errors
    /// A client ended or stopped asking; [`crate::lab::interrupt::Interrupted`].
    pub fn more(&mut self, count: usize, interrupt: &Interrupt) -> anyhow::Result<()> {
        let since = Instant::now();
        let mut missing = vec![count; self.clients.len()];
        while missing.iter().any(|missing| *missing > 0) {
            interrupt.check()?;
            match self.incoming.recv_timeout(SLICE) {
                Ok((index, request)) => {
                    let request = request?;
                    if let Some(missing) = missing.get_mut(index).filter(|_| request.not_before >= since) {
                        *missing = missing.saturating_sub(1);
                    }
                    self.requests.push(request);
                }
                Err(RecvTimeoutError::Timeout) if since.elapsed() < self.patience => {}
                Err(_) => bail!("the clients stopped asking"),
            }
        }
        Ok(())
    }

    /// The requests that began after one moment, of those that [`Streams::more`] has seen; and not certainly after another.
    pub fn between(&self, from: Instant, to: Instant) -> Vec<&Request> {
        self.requests.iter().filter(|request| (from..to).contains(&request.not_before)).collect()
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        for client in &mut self.clients {
            // An error means that it has ended already.
            let _ = client.kill();
            let _ = client.wait();
        }
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
    }
}

/// `curl`, started in the client's namespace and control group, and what it reports.
fn curl(asker: &Asker, count: usize, patience: Duration, paced: bool) -> anyhow::Result<(Child, Reports<ChildStderr>)> {
    let mut command = Command::new(process::own_binary()?);
    command.args(["lab", "__in"]).arg(&asker.group).args(["--", "curl", "-sf", "--noproxy", "*"]);
    let seconds = seconds(patience);
    command.args(["--max-time", seconds.as_str(), "-H", "Connection: close", "-o", "/dev/null", "-w", REPORT]);
    if paced {
        command.args(["--rate", RATE]);
    }
    command
        .arg(format!("http://{}/?[1-{count}]", asker.to))
        // Ctrl-C at the terminal is for the demo alone: a client it killed would look like one that failed.
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let begun = Instant::now();
    let mut child = netns::within(&asker.netns, || command.spawn())?.context("cannot start curl")?;
    let pipe = child.stderr.take().context("curl has no standard error")?;
    Ok((child, Reports { pipe, empty: begun }))
}

/// Lines of [`REPORT`] out of a pipe.
struct Reports<P> {
    pipe: P,
    /// When the pipe was empty last. What is read after that was written after it.
    empty: Instant,
}

impl<P: Read + AsFd> Reports<P> {
    /// The requests that they tell of. A request begins when the line of the one before is written.
    fn requests(self, who: Arc<str>) -> impl Iterator<Item = anyhow::Result<Request>> {
        let mut lines = BufReader::new(self);
        std::iter::from_fn(move || {
            let not_before = lines.get_ref().empty;
            let mut line = String::new();
            match lines.read_line(&mut line) {
                Ok(0) => None,
                Ok(_) => Some(read(&who, line.trim_end_matches('\n'), not_before)),
                Err(error) => Some(Err(error.into())),
            }
        })
    }
}

impl<P: Read + AsFd> Read for Reports<P> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let now = Instant::now();
        if poll(&mut [PollFd::new(&self.pipe, PollFlags::IN)], Some(&Timespec::default()))? == 0 {
            self.empty = now;
        }
        self.pipe.read(buffer)
    }
}

/// Reads [`REPORT`].
fn read(who: &Arc<str>, line: &str, not_before: Instant) -> anyhow::Result<Request> {
    let fields: Vec<&str> = line.splitn(5, '|').collect();
    let [code, took, by, client, why] = fields[..] else { bail!("curl: {line}") };
    let code: i32 = code.parse().with_context(|| format!("curl: {line}"))?;
    let took = Duration::try_from_secs_f64(took.parse()?)?;
    let outcome = match code {
        0 => Ok(Answer { by: by.to_owned(), client: client.parse().with_context(|| format!("curl: {line}"))? }),
        _ => Err(Failed { code, why: why.to_owned() }),
    };
    Ok(Request { who: Arc::clone(who), not_before, took, outcome })
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::BorrowedFd;

    use super::*;

    #[test]
    fn what_curl_reports_is_read_and_other_words_are_an_error() {
        let (now, who) = (Instant::now(), Arc::from("x → y"));
        let read = |line| read(&who, line, now);
        let request = read("0|0.002500|stall-1|fd00::2|").unwrap();
        assert_eq!(request.outcome, Ok(Answer { by: "stall-1".into(), client: "fd00::2".parse().unwrap() }));
        assert_eq!((request.not_before, request.took), (now, Duration::from_micros(2500)));
        let failed = |line| read(line).unwrap().outcome.unwrap_err();
        let refused = failed("7|0.000103|||Failed to connect to 10.96.0.10 port 81 after 0 ms: Couldn't connect | x");
        assert!(refused.refused() && !refused.silent() && refused.why.ends_with("| x"), "{refused}");
        assert!(failed("28|1.5|||Connection timed out").silent());
        assert!(read("curl: option --rate: is unknown").is_err());
        assert!(read("0|0.1|stall-1||").is_err());
    }

    /// A pipe whose other end writes one more line whenever somebody waits for it.
    struct Slow(io::PipeReader, io::PipeWriter);

    impl Read for Slow {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            if poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&Timespec::default()))? == 0 {
                self.1.write_all(LINE)?;
            }
            self.0.read(buffer)
        }
    }

    impl AsFd for Slow {
        fn as_fd(&self) -> BorrowedFd<'_> {
            self.0.as_fd()
        }
    }

    const LINE: &[u8] = b"0|0.002500|stall-1|fd00::2|\n";

    #[test]
    fn what_a_late_reader_reads_is_not_taken_for_a_request_that_began_late() {
        let begun = Instant::now();
        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(&LINE.repeat(2)).unwrap();
        let told = Instant::now();
        let reports = Reports { pipe: Slow(reader, writer), empty: begun };
        let requests: Vec<_> = reports.requests("x → y".into()).take(4).map(Result::unwrap).collect();
        // Two lines were there; the third may be of one that was on its way.
        assert!(requests[..3].iter().all(|request| request.not_before < told), "{requests:?}");
        assert!(requests[3].not_before >= told, "{requests:?}");
    }
}
