//! A steady stream of connections and long transfers, for tests that break something meanwhile.
//!
//! Against an echo server: each connection reads the greeting, sends one line, reads it back and closes. What fails
//! is counted by reason; the result is one JSON object on standard output. SIGTERM ends it early, as if its time were
//! over.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use super::echo::raise_file_limit;
use super::netns::block_on;
use crate::span;

/// Arguments of the hidden command.
#[derive(Debug, clap::Args)]
pub struct LoadArgs {
    /// The echo server's address and port.
    #[arg(long)]
    to: SocketAddr,
    /// New connections a second.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rate: u32,
    /// How long, in seconds.
    #[arg(long, default_value_t = 10, value_name = "SECONDS", value_parser = span::seconds())]
    seconds: u64,
    /// How long one connection may take before it counts as failed, in milliseconds.
    #[arg(long, default_value_t = 5000, value_name = "MS", value_parser = span::milliseconds())]
    timeout: u64,
    /// Long transfers at once.
    #[arg(long, default_value_t = 1)]
    longs: u32,
    /// How long each of them lasts before the next begins, in seconds; the whole time if absent.
    #[arg(long, value_name = "SECONDS", value_parser = span::seconds())]
    long_seconds: Option<u64>,
}

/// What came of it.
#[derive(Debug, Default, Serialize)]
struct Report {
    /// Connections tried.
    connections: u64,
    /// Connections that failed in any way.
    failed: u64,
    /// The failures by reason.
    errors: BTreeMap<String, u64>,
    /// The slowest connection that worked, from connect to close.
    max_ms: f64,
    /// The median of those that worked.
    p50_ms: f64,
    /// The long transfers together.
    long: Long,
}

#[derive(Debug, Default, Serialize)]
struct Long {
    /// Whether all lasted until their end.
    ok: bool,
    /// How many there were.
    transfers: u64,
    /// Bytes sent and received back.
    bytes: u64,
    /// The longest time without a byte coming back.
    longest_gap_ms: f64,
    /// Why the first of them broke.
    error: Option<String>,
}

/// When it is over.
#[derive(Clone)]
struct End {
    at: Instant,
    asked: Arc<AtomicBool>,
}

impl End {
    fn is_over(&self) -> bool {
        self.asked.load(Ordering::Relaxed) || Instant::now() >= self.at
    }
}

/// Runs the load and prints the report; exit code 1 if anything failed.
///
/// # Errors
/// No runtime, or the report cannot be printed.
pub fn run(args: LoadArgs) -> anyhow::Result<ExitCode> {
    raise_file_limit();
    let report = block_on(load(&args))?;
    crate::output::write_out(&(serde_json::to_string(&report)? + "\n"))?;
    Ok(if report.failed == 0 && report.long.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn load(args: &LoadArgs) -> Report {
    let limit = Duration::from_millis(args.timeout);
    let asked = Arc::new(AtomicBool::new(false));
    if let Ok(mut term) = signal(SignalKind::terminate()) {
        let asked = Arc::clone(&asked);
        tokio::spawn(async move {
            term.recv().await;
            asked.store(true, Ordering::Relaxed);
        });
    }
    let end = End { at: Instant::now() + Duration::from_secs(args.seconds), asked };
    let each = args.long_seconds.map(Duration::from_secs);
    let mut longs = JoinSet::new();
    for _ in 0..args.longs {
        longs.spawn(transfers(args.to, end.clone(), each, limit));
    }
    let outcomes: Arc<Mutex<Vec<Result<Duration, String>>>> = Arc::default();
    let mut running = JoinSet::new();
    let mut ticks = interval(Duration::from_secs(1) / args.rate);
    // A late tick is made up for: the rate is a promise, not a hope.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    loop {
        ticks.tick().await;
        if end.is_over() {
            break;
        }
        let (to, outcomes) = (args.to, Arc::clone(&outcomes));
        running.spawn(async move {
            let begun = Instant::now();
            let outcome = match timeout(limit, exchange(to)).await {
                Ok(Ok(())) => Ok(begun.elapsed()),
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err(format!("no answer within {} ms", limit.as_millis())),
            };
            outcomes.lock().unwrap_or_else(PoisonError::into_inner).push(outcome);
        });
        while running.try_join_next().is_some() {}
    }
    while running.join_next().await.is_some() {}
    let mut long = Long { ok: true, ..Long::default() };
    while let Some(one) = longs.join_next().await {
        long.add(one.unwrap_or_else(|error| Long { error: Some(error.to_string()), ..Long::default() }));
    }
    let outcomes = outcomes.lock().unwrap_or_else(PoisonError::into_inner);
    summarise(&outcomes, long)
}

fn summarise(outcomes: &[Result<Duration, String>], long: Long) -> Report {
    let mut report = Report { connections: outcomes.len() as u64, long, ..Report::default() };
    let mut times = Vec::new();
    for outcome in outcomes {
        match outcome {
            Ok(time) => times.push(*time),
            Err(error) => {
                report.failed += 1;
                *report.errors.entry(error.clone()).or_default() += 1;
            }
        }
    }
    times.sort();
    report.max_ms = times.last().map_or(0.0, |time| milliseconds(*time));
    report.p50_ms = times.get(times.len() / 2).map_or(0.0, |time| milliseconds(*time));
    report
}

async fn exchange(to: SocketAddr) -> io::Result<()> {
    let mut connection = BufReader::new(TcpStream::connect(to).await?);
    let mut line = String::new();
    if connection.read_line(&mut line).await? == 0 {
        return Err(io::Error::other("closed before the greeting"));
    }
    connection.write_all(b".\n").await?;
    line.clear();
    connection.read_line(&mut line).await?;
    if line != ".\n" {
        return Err(io::Error::other("closed before the echo"));
    }
    Ok(())
}

impl Long {
    fn add(&mut self, other: Self) {
        self.ok &= other.ok;
        self.transfers += other.transfers;
        self.bytes += other.bytes;
        self.longest_gap_ms = self.longest_gap_ms.max(other.longest_gap_ms);
        self.error = self.error.take().or(other.error);
    }
}

/// One transfer after the other.
async fn transfers(to: SocketAddr, end: End, each: Option<Duration>, limit: Duration) -> Long {
    let mut all = Long { ok: true, ..Long::default() };
    while !end.is_over() {
        let at = each.map_or(end.at, |each| end.at.min(Instant::now() + each));
        all.add(transfer(to, &End { at, asked: Arc::clone(&end.asked) }, limit).await);
        if !all.ok {
            break;
        }
    }
    all
}

/// Sends line after line over one connection, each after the previous came back.
async fn transfer(to: SocketAddr, end: &End, limit: Duration) -> Long {
    let mut long = Long { transfers: 1, ..Long::default() };
    let outcome = async {
        let mut connection = BufReader::new(TcpStream::connect(to).await?);
        let mut line = String::new();
        connection.read_line(&mut line).await?;
        let block = format!("{}\n", "x".repeat(1023));
        let mut last = Instant::now();
        while !end.is_over() {
            connection.write_all(block.as_bytes()).await?;
            line.clear();
            match timeout(limit, connection.read_line(&mut line)).await {
                Ok(read) => {
                    if read? != block.len() {
                        return Err(io::Error::other("closed"));
                    }
                }
                Err(_) => return Err(io::Error::other(format!("silent for {} ms", limit.as_millis()))),
            }
            let now = Instant::now();
            long.longest_gap_ms = long.longest_gap_ms.max(milliseconds(now - last));
            long.bytes += block.len() as u64;
            last = now;
        }
        Ok(())
    }
    .await;
    match outcome {
        Ok(()) => long.ok = true,
        Err(error) => long.error = Some(error.to_string()),
    }
    long
}

/// For reports, in microseconds' precision.
pub fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_counted_by_reason() {
        let refused = || Err("refused".to_owned());
        let report = summarise(&[Ok(Duration::from_millis(2)), refused(), refused()], Long::default());
        assert_eq!((report.connections, report.failed, report.errors["refused"]), (3, 2, 2));
        assert_eq!((report.max_ms, report.p50_ms), (2.0, 2.0));
    }
}
