//! Act 7: replicas go, clients go on.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::process::Signal;
use serde_json::{Value, json};

use super::super::requests::{self, Request, Streams};
use super::services::{CLUSTER, DSR_NODE_PORT, NAMESPACE, NODE_PORT, PORT, REPLICAS, REQUESTS, failure, first_failure};
use super::{Held, Play, in_ms};
use crate::lab::cluster::{self, Change};
use crate::lab::process::{self, ProcessId};
use crate::lab::state::PodRecord;

/// Requests of each client in a steady stream after every event.
const STRETCH: usize = 100;
/// Connections that may be needed until each replica has served one.
const TRIES: usize = 64;
/// Faster than TCP says a lost packet again: of connections that fail within it most were told so. A single one may
/// wait for a processor that long.
const AT_ONCE: Duration = Duration::from_secs(1);
/// A moment in the future; that there is one says that the pod terminates.
const DELETION: &str = "2030-01-01T00:00:00Z";

impl Play<'_> {
    /// Act 7.
    pub(super) fn replicas_go(&self) -> anyhow::Result<()> {
        self.stage.act(
            7,
            "Replicas go, clients go on",
            "Three clients send requests all the time, each on a new connection: front/ui and front/app to the cluster\n\
             addresses, a host outside to a node's port. front/ui also holds a connection open to each replica.",
        );
        let (node1, _) = self.nodes()?;
        let askers = [
            self.asker("front/ui", (CLUSTER[0], PORT).into())?,
            self.asker("front/app", (CLUSTER[1], PORT).into())?,
            self.asker("world", (node1[0], DSR_NODE_PORT).into())?,
        ];
        let mut streams = Streams::start(&askers, self.lab.patience())?;
        streams.more(STRETCH, self.interrupt)?;
        let mut held = match self.held() {
            Ok(held) => held,
            Err(error) => {
                self.stage.check("a connection to each replica is established", Err(format!("{error:#}")));
                return Ok(());
            }
        };
        self.terminates(&mut streams, &mut held[0])?;
        self.may_go_on()?;
        self.dies(&mut streams, &mut held[1])?;
        drop(streams);
        self.may_go_on()?;
        self.nobody_left()
    }

    /// A replica goes as Kubernetes lets it go: it terminates, finishes, is gone. Then there is a new one.
    fn terminates(&self, streams: &mut Streams, held: &mut Held) -> anyhow::Result<()> {
        let replica = REPLICAS[0];
        let begun = Instant::now();
        let took = self.edit(replica, |pod| pod["metadata"]["deletionTimestamp"] = DELETION.into())?;
        let told = Instant::now();
        streams.more(STRETCH, self.interrupt)?;
        let since = streams.between(told, Instant::now());
        let late =
            since.iter().filter(|request| request.outcome.as_ref().is_ok_and(|answer| answer.by == replica)).count();
        let seen = match late {
            0 => Ok(format!("in force after {}; {} connections since", in_ms(took), since.len())),
            late => Err(format!("{late} of {} connections went to it", since.len())),
        };
        self.stage.check("stall-1 terminates: no new connection goes to it", seen);
        let seen = match held.served_by(self.lab.patience()) {
            Ok(by) if by == replica => Ok(String::new()),
            other => Err(format!("{other:?}")),
        };
        self.stage.check("the connection that is open stays with it, and answers", seen);

        let finished = process::end(&self.programs(&self.stalls()?.0), Signal::QUIT, self.lab.patience());
        let ended = held.line(self.lab.patience());
        self.apply_but(&[replica])?;
        streams.more(STRETCH, self.interrupt)?;
        let all = streams.between(begun, Instant::now());
        let failed: Vec<String> = all.iter().filter_map(|request| failure(request)).collect();
        let seen = match (finished, failed.len()) {
            (true, 0) => Ok(format!("{} connections, the slowest {}", all.len(), in_ms(slowest(&all)))),
            (false, _) => Err(format!("nginx did not finish within {} s", self.lab.patience_s)),
            (true, count) => Err(format!("{count} of {} failed\n{}", all.len(), counted(&failed))),
        };
        self.stage.check("it finishes (SIGQUIT) and is removed: not one connection failed all the while", seen);
        let seen = match ended {
            Err(error) if error.kind() == std::io::ErrorKind::Other => Ok(String::new()),
            other => Err(format!("{other:?}")),
        };
        self.stage.check("its server closed the open connection in order, when it was idle", seen);

        let begun = Instant::now();
        self.apply_but(&[])?;
        let (took, told) = (begun.elapsed(), Instant::now());
        streams.more(STRETCH, self.interrupt)?;
        let since = streams.between(told, Instant::now());
        let share =
            since.iter().filter(|request| request.outcome.as_ref().is_ok_and(|answer| answer.by == replica)).count();
        let failed: Vec<String> = since.iter().filter_map(|request| failure(request)).collect();
        let seen = match (share, failed.len()) {
            (1.., 0) => Ok(format!(
                "{share} of {} connections, {:.1} s after it was asked for",
                since.len(),
                took.as_secs_f64()
            )),
            (share, _) => Err(format!("{share} of {} connections\n{}", since.len(), counted(&failed))),
        };
        self.stage.check("a new stall-1 takes its share", seen);
        Ok(())
    }

    /// A replica is killed, and somebody notices after a while.
    fn dies(&self, streams: &mut Streams, held: &mut Held) -> anyhow::Result<()> {
        self.stage.line("");
        self.stage
            .text("stall-2 is killed (kill -9). That it is not ready any more is known only when somebody notices.");
        let killed = Instant::now();
        process::kill_groups(&self.programs(&self.stalls()?.1))?;
        let seen = match held.line(self.lab.patience()) {
            Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => Ok(error.to_string()),
            other => Err(format!("{other:?}")),
        };
        self.stage.check("the client that had a connection open to it is told at once", seen);
        streams.more(STRETCH, self.interrupt)?;
        let took = self.edit(REPLICAS[1], |pod| {
            pod["status"]["conditions"] = json!([{"type": "Ready", "status": "False"}]);
        })?;
        let told = Instant::now();
        streams.more(STRETCH, self.interrupt)?;

        let between = streams.between(killed, told);
        let failed: Vec<&Request> = between.iter().filter(|request| request.outcome.is_err()).copied().collect();
        let refused =
            failed.iter().filter(|request| request.outcome.as_ref().is_err_and(|failed| failed.refused())).count();
        let words: Vec<String> = failed.iter().filter_map(|request| failure(request)).collect();
        let (usual, latest) = (median(&failed), slowest(&failed));
        let silent = failed.iter().any(|request| request.outcome.as_ref().is_err_and(|failed| failed.silent()));
        let seen = if !failed.is_empty() && usual < AT_ONCE && !silent {
            let cut = match failed.len() - refused {
                0 => String::new(),
                cut => format!(", {cut} cut off"),
            };
            let (noticed, latest) = (in_ms(told.duration_since(killed)), in_ms(latest));
            Ok(format!("{refused} of {} refused{cut}, within {latest}; it took {noticed}", between.len()))
        } else {
            Err(format!(
                "{} of {} failed, most after {}, the slowest after {}\n{}",
                failed.len(),
                between.len(),
                in_ms(usual),
                in_ms(latest),
                counted(&words)
            ))
        };
        self.stage.check("until somebody notices, connections to it fail at once, none waits in silence", seen);
        let since = streams.between(told, Instant::now());
        let words: Vec<String> = since.iter().filter_map(|request| failure(request)).collect();
        let seen = match words.len() {
            0 => Ok(format!("in force after {}; {} connections since", in_ms(took), since.len())),
            count => Err(format!("{count} of {}\n{}", since.len(), counted(&words))),
        };
        self.stage.check("it is known not to be ready: from then on not one connection fails", seen);
        Ok(())
    }

    /// Without replicas the service refuses; with new ones it serves.
    fn nobody_left(&self) -> anyhow::Result<()> {
        let (node1, _) = self.nodes()?;
        let askers = [
            self.asker("front/ui", (CLUSTER[0], PORT).into())?,
            self.asker("front/app", (CLUSTER[1], PORT).into())?,
            self.asker("world", (node1[0], NODE_PORT).into())?,
        ];
        self.apply_but(&REPLICAS)?;
        let mut problems = Vec::new();
        let mut latest = Duration::ZERO;
        for asker in &askers {
            let asked = requests::ask(asker, REQUESTS, self.lab.patience())?;
            for request in &asked {
                match &request.outcome {
                    Err(failed) if failed.refused() => {}
                    other => problems.push(format!("{}: {other:?}", request.who)),
                }
            }
            let usual = median(&asked.iter().collect::<Vec<_>>());
            latest = latest.max(usual);
            if usual >= AT_ONCE {
                problems.push(format!("{} → {}: refused after {}", asker.name, asker.to, in_ms(usual)));
            }
        }
        let seen =
            if problems.is_empty() { Ok(format!("after {}", in_ms_fine(latest))) } else { Err(problems.join("\n")) };
        self.stage.check("scaled to none: clients inside and outside are refused at once", seen);
        let begun = Instant::now();
        self.apply_but(&[])?;
        let took = begun.elapsed();
        let mut problems = Vec::new();
        for asker in &askers[..2] {
            problems.extend(first_failure(&requests::ask(asker, REQUESTS, self.lab.patience())?));
        }
        let seen =
            if problems.is_empty() { Ok(format!("{:.1} s", took.as_secs_f64())) } else { Err(problems.join("\n")) };
        self.stage.check("scaled to two again: it serves", seen);
        Ok(())
    }

    /// Changes what the store says of a replica; how long until every node enforced it.
    fn edit(&self, replica: &str, edit: impl FnOnce(&mut Value)) -> anyhow::Result<Duration> {
        let key = format!("resources/Pod/{NAMESPACE}/{replica}");
        let stored = cluster::resources(&self.lab)?;
        let text = stored.get(&key).with_context(|| format!("the store has no {key}"))?;
        let mut pod: Value = serde_json::from_str(text)?;
        edit(&mut pod);
        self.change(&Change { put: BTreeMap::from([(key, pod.to_string())]), delete: Vec::new() })
    }

    /// An open connection of `front/ui` to each replica, by the service.
    fn held(&self) -> anyhow::Result<[Held; 2]> {
        let mut found: [Option<Held>; 2] = [None, None];
        for _ in 0..TRIES {
            let mut one = Held::open(&self.ui.netns, (CLUSTER[0], PORT).into(), self.lab.patience())?;
            let by = one.served_by(self.lab.patience())?;
            let index = REPLICAS.iter().position(|replica| *replica == by).with_context(|| format!("{by} answers"))?;
            found[index].get_or_insert(one);
            if found.iter().all(Option::is_some) {
                break;
            }
        }
        match found {
            [Some(first), Some(second)] => Ok([first, second]),
            _ => anyhow::bail!("one replica serves none of {TRIES} connections"),
        }
    }

    fn programs(&self, pod: &PodRecord) -> Vec<ProcessId> {
        pod.programs(&self.lab).into_iter().filter_map(|(_, process)| process).collect()
    }
}

fn slowest(requests: &[&Request]) -> Duration {
    requests.iter().map(|request| request.took).max().unwrap_or_default()
}

/// How long half of them took at most.
fn median(requests: &[&Request]) -> Duration {
    let mut took: Vec<Duration> = requests.iter().map(|request| request.took).collect();
    took.sort_unstable();
    took.get(took.len() / 2).copied().unwrap_or_default()
}

/// Each text once, with how often it occurs.
fn counted(texts: &[String]) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    texts.iter().for_each(|text| *counts.entry(text).or_default() += 1);
    counts.iter().map(|(text, count)| format!("{count} × {text}")).collect::<Vec<_>>().join("\n")
}

fn in_ms_fine(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}
