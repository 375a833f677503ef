//! The acts.

mod replicas;
mod services;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use cirri_control::resource::{Resource, parse_documents};
use cirri_flow::{Filter, Flow, Record, RuleKind, Verdict};
use serde_json::json;

use super::stage::Stage;
use super::traffic::{self, Cell, Client, Held, Outcome, Reach, SILENCE, Server};
use crate::api::{EndpointInfo, Explanation, Observe, PolicyExplain};
use crate::client::{self, CallError};
use crate::exit::{Error, Failure};
use crate::lab::apply::apply;
use crate::lab::cluster::{self, Change};
use crate::lab::interrupt::{Interrupt, Interrupted};
use crate::lab::state::{Lab, LabName, PodRecord, Routing};
use crate::lab::{agent, netns, pods, process, underlay, up};
use crate::output::Table;

const PODS: &str = include_str!("../../demo/pods.yaml");
const POLICIES: &str = include_str!("../../demo/policies.yaml");

/// Requests of the steady stream before the agents are killed, while there is none, and when they are back.
const STRETCH: usize = 50;
/// How long a wait may keep an interruption waiting.
const INTERRUPT_CHECK: Duration = Duration::from_millis(100);
/// How long to look for a flow before its connection is tried again.
const LOOK: Duration = Duration::from_secs(5);
/// The shortest look: a socket takes no shorter limit than that of one that never ends.
const LEAST_LOOK: Duration = Duration::from_millis(100);
/// The file with the servers' addresses, as the pods' programs find it from their working directories.
const ADDRESSES: &str = "addresses";

/// Plays all acts.
///
/// # Errors
/// What could not even be tried; a claim that does not hold is a failed check, not an error. [`Interrupted`].
pub fn play(stage: &Stage, name: &LabName, patience_s: u64, interrupt: &Interrupt) -> anyhow::Result<Lab> {
    let lab = cluster_up(stage, name, patience_s, interrupt)?;
    let play = Play::new(stage, lab, interrupt)?;
    play.everything_talks()?;
    play.may_go_on()?;
    let since = play.a_policy()?;
    play.may_go_on()?;
    play.the_flows(since)?;
    play.may_go_on()?;
    play.in_the_middle()?;
    play.may_go_on()?;
    play.without_agents()?;
    play.may_go_on()?;
    play.a_service()?;
    play.may_go_on()?;
    play.replicas_go()?;
    play.may_go_on()?;
    play.all_the_while()?;
    Ok(play.lab)
}

/// Act 1.
fn cluster_up(stage: &Stage, name: &LabName, patience_s: u64, interrupt: &Interrupt) -> anyhow::Result<Lab> {
    stage.act(
        1,
        "The cluster",
        "Two nodes, an agent on each, etcd between them. Pods are attached by the CNI plugin and run real programs.",
    );
    let begun = Instant::now();
    let nodes = ["node1".to_owned(), "node2".to_owned()];
    let lab = Lab { patience_s, ..Lab::described(name, &nodes, Routing::Overlay, &[]) };
    up::bring_up(&lab, interrupt, &|_| {})?;
    let ready = begun.elapsed();
    stage.check("two nodes, their agents ready", Ok(format!("{:.1} s", ready.as_secs_f64())));
    let begun = Instant::now();
    apply(&lab, parse("pods.yaml", PODS)?, Some(lab.patience()), interrupt, &|_| {})?;
    let took = begun.elapsed();

    let all = lab.pods()?;
    let endpoints = cluster::each_node(&lab, |node| {
        client::call::<Vec<EndpointInfo>>(&lab.agent_socket(&node.name), "endpoint.list", &json!({}), lab.patience())
            .with_context(|| format!("the agent of {}", node.name))
    })?;
    let endpoints: Vec<EndpointInfo> = endpoints.into_iter().flatten().collect();
    let mut table = Table::new(["pod", "node", "identity", "IPv4", "IPv6", "runs"]);
    for pod in &all {
        let identity = endpoints
            .iter()
            .find(|endpoint| endpoint.namespace == pod.key.namespace && endpoint.pod == pod.key.name)
            .map_or("-".to_owned(), |endpoint| endpoint.identity.to_string());
        let address = |wanted: fn(&IpAddr) -> bool| {
            pod.addresses.iter().copied().find(wanted).map_or("-".to_owned(), |address| address.to_string())
        };
        let runs = match pod.key.name.as_str() {
            "web" => "nginx, and redis-cli INCR visits",
            "redis" => "redis-server",
            "report" => "redis-cli GET visits",
            _ => "curl http://web",
        };
        let (v4, v6) = (address(IpAddr::is_ipv4), address(IpAddr::is_ipv6));
        table.row([pod.key.to_string(), pod.node.clone(), identity, v4, v6, runs.to_owned()]);
    }
    stage.text(&table.render(None));
    let running = all
        .iter()
        .filter(|pod| pod.complete && pod.programs(&lab).iter().all(|(_, process)| process.is_some()))
        .filter(|pod| pod.addresses.len() == 2 && pods::is_attached(pod))
        .count();
    let seen = match running {
        6 => Ok(format!("{:.1} s", took.as_secs_f64())),
        other => Err(format!("{other} of {} pods run", all.len())),
    };
    stage.check("six pods run on both nodes, each with an IPv4 and an IPv6 address", seen);
    Ok(lab)
}

struct Play<'a> {
    stage: &'a Stage,
    lab: Lab,
    interrupt: &'a Interrupt,
    clients: Vec<Client>,
    servers: [Server; 2],
    web: PodRecord,
    redis: PodRecord,
    ui: PodRecord,
}

impl<'a> Play<'a> {
    fn new(stage: &'a Stage, lab: Lab, interrupt: &'a Interrupt) -> anyhow::Result<Self> {
        let pod = |name: &str| lab.pod(&name.parse().map_err(anyhow::Error::msg)?);
        let (web, redis, ui) = (pod("shop/web")?, pod("shop/redis")?, pod("front/ui")?);
        let mut clients = Vec::new();
        for name in ["front/app", "front/ui", "shop/web", "shop/report", "guest/scan"] {
            clients.push(Client { name: name.to_owned(), netns: pod(name)?.netns });
        }
        let world: PathBuf = netns::path(&lab.name.world_namespace());
        clients.push(Client { name: "world".to_owned(), netns: world });
        let servers = [
            Server { service: "web", addresses: web.addresses.clone() },
            Server { service: "redis", addresses: redis.addresses.clone() },
        ];
        // The pods' own programs wait for it.
        let mut addresses = String::new();
        for (name, pod) in [("WEB", &web), ("REDIS", &redis)] {
            for address in &pod.addresses {
                addresses.push_str(&format!("{name}{}={address}\n", if address.is_ipv4() { 4 } else { 6 }));
            }
        }
        crate::files::write_atomic(&lab.name.directory().join(ADDRESSES), addresses.as_bytes())?;
        Ok(Self { stage, lab, interrupt, clients, servers, web, redis, ui })
    }

    fn may_go_on(&self) -> Result<(), Interrupted> {
        if self.stage.gone() { Err(Interrupted) } else { self.interrupt.check() }
    }

    /// Act 2.
    fn everything_talks(&self) -> anyhow::Result<()> {
        self.stage.act(
            2,
            "Without a policy, everything talks",
            "A real curl and a real redis-cli from every pod, and from a host outside the cluster, in both families.",
        );
        let reached = self.reached(|_, _| true)?;
        self.stage.matrix(&reached);
        self.stage.check(
            &format!("all {} connections work", reached.len()),
            compare(&reached, |_, _| true).map(|()| String::new()),
        );
        let mut done = Vec::new();
        for (pod, program, does) in [
            ("shop/web", "visits", COUNTS),
            ("shop/report", "read", COUNTS),
            ("front/app", "get", WELCOMES),
            ("front/ui", "get", WELCOMES),
            ("guest/scan", "get", WELCOMES),
        ] {
            done.push(self.program_does(pod, program, does)?);
        }
        let done: Result<Vec<String>, String> = done.into_iter().collect();
        self.stage.check("and the pods' own programs do what they are for", done.map(|done| done.join(", ")));
        Ok(())
    }

    /// Act 3. Answers when the policy was enforced, in nanoseconds since 1970.
    fn a_policy(&self) -> anyhow::Result<u64> {
        self.stage.act(
            3,
            "A NetworkPolicy",
            "default-deny     pods of the namespace shop accept nothing,\n\
             web-from-front   but web accepts its port http from namespaces with tier=front,\n\
             redis-from-web   and redis accepts its port redis from web.",
        );
        let policies = parse("policies.yaml", POLICIES)?;
        let put = policies.iter().map(|policy| (policy.store_key(), policy.to_json())).collect();
        let took = self.change(&Change { put, delete: Vec::new() })?;
        let since = now();
        let refused = cluster::refused_policies(&self.lab)?;
        let seen = if refused.is_empty() { Ok(in_ms(took)) } else { Err(refused.join("\n")) };
        self.stage.check("three policies written, and enforced on both nodes", seen);
        let reached = self.reached(allowed)?;
        self.stage.matrix(&reached);
        let open = reached.iter().filter(|cell| allowed(&cell.from, cell.service)).count();
        self.stage.check(
            &format!("exactly what the policies allow: {open} connections pass, {} are dropped", reached.len() - open),
            compare(&reached, allowed).map(|()| String::new()),
        );
        let answers: anyhow::Result<Vec<Reach>> = reached.iter().map(|cell| self.predicted(cell)).collect();
        self.stage.check(
            &format!("`cirri policy explain` says the same of all {}", reached.len()),
            compare(&answers?, allowed).map(|()| String::new()),
        );
        Ok(since)
    }

    /// Act 4.
    fn the_flows(&self, since: u64) -> anyhow::Result<()> {
        self.stage.act(
            4,
            "The flows, and the rule behind each",
            "The packet path reports every verdict with the rule that decided; agents put names to it.",
        );
        let passed = [
            ("shop/web", self.web.node.as_str(), "front/ui", "shop/web-from-front"),
            ("shop/redis", self.redis.node.as_str(), "shop/web", "shop/redis-from-web"),
        ];
        for (to, node, from, policy) in passed {
            self.stage.command(node, &format!("cirri observe --from {from} --to {to} --type new --last 1"));
            // The last packets of a connection from before the policy tell of no rule.
            let filter = Filter { kind: vec!["new".to_owned()], ..ends(from, to, "forwarded") };
            let flow = self.flow(node, since, filter)?;
            let seen = match &flow {
                Some(flow) => {
                    self.stage
                        .text(&cirri_flow::compact_with(&Record::Flow(Box::new(flow.clone())), self.stage.colours()));
                    let rule = flow.ingress_rule.as_ref().and_then(|rule| rule.policy.as_deref());
                    if rule == Some(policy) { Ok(String::new()) } else { Err(format!("the rule is {rule:?}")) }
                }
                None => Err("no such flow".to_owned()),
            };
            self.stage.check(&format!("{from} may reach {to}, because of the policy {policy}"), seen);
        }
        self.stage.command(&self.redis.node, "cirri observe --from shop/report --verdict dropped --last 1");
        let flow = self.flow(&self.redis.node, since, ends("shop/report", "shop/redis", "dropped"))?;
        self.drop_seen(
            flow,
            "shop/report is dropped at redis: POLICY_DENIED (133), because no rule of the policies allows it",
        );
        self.stage.command(&self.redis.node, "cirri policy explain --from shop/report --to shop/redis --port 6379");
        let answer = self.explain(&self.redis.node, "shop/report", "shop/redis", 6379)?;
        for (name, direction) in [("Egress ", &answer.egress), ("Ingress", &answer.ingress)] {
            if let Some(direction) = direction {
                self.stage.text(&format!("{name} {}: {}", direction.verdict, direction.rule));
            }
        }
        let ingress = answer.ingress.as_ref().map(|ingress| ingress.rule.as_str()).unwrap_or_default();
        let named = ["shop/default-deny", "shop/redis-from-web"].iter().all(|policy| ingress.contains(policy));
        let seen = if answer.verdict == "deny" && named { Ok(String::new()) } else { Err(format!("{answer:?}")) };
        self.stage.check("the explanation names the policies that select redis", seen);
        Ok(())
    }

    /// Act 5, first part.
    fn in_the_middle(&self) -> anyhow::Result<()> {
        self.stage.act(
            5,
            "In the middle of things",
            "web holds a connection to redis open, ui one to web. The policy redis-from-web is removed, then put back.",
        );
        let redis = self.address(&self.redis, 6379, true)?;
        let web = self.address(&self.web, 80, false)?;
        let patience = self.lab.patience();
        let held = |netns, to| Held::open(netns, to, patience);
        let opened = held(&self.web.netns, redis).and_then(|one| Ok((one, held(&self.ui.netns, web)?)));
        let established = "both connections are established and answer";
        let (mut closing, mut other) = match opened {
            Ok(both) => both,
            Err(error) => {
                self.stage.check(established, Err(format!("{error:#}")));
                return Ok(());
            }
        };
        let before = closing.redis("PING", patience).map_err(|error| error.to_string());
        let page = other.get(patience).map_err(|error| error.to_string());
        self.stage.check(established, before.and(page).map(|()| String::new()));

        let key = "resources/NetworkPolicy/shop/redis-from-web".to_owned();
        let took = self.change(&Change { delete: vec![key.clone()], ..Change::default() })?;
        let since = now();
        let answer = closing.redis("PING", SILENCE);
        let seen = match answer {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(in_ms(took)),
            other => Err(format!("{other:?}")),
        };
        self.may_go_on()?;
        self.stage.check("the policy gone, the open connection to redis is silent from the next packet on", seen);
        let mut filter = ends("shop/web", "shop/redis", "dropped");
        filter.port = vec![closing.local.port()];
        let flow = self.flow(&self.redis.node, since, filter)?;
        self.drop_seen(flow, "its packet is a drop that names its reason like any other");
        let page = other.get(patience).map(|()| String::new()).map_err(|error| error.to_string());
        self.stage.check("the other connection, which that policy does not concern, goes on", page);

        let policies = parse("policies.yaml", POLICIES)?;
        let put = policies.iter().filter(|policy| policy.store_key() == key);
        let put = put.map(|policy| (policy.store_key(), policy.to_json())).collect();
        self.change(&Change { put, delete: Vec::new() })?;
        let begun = Instant::now();
        let answer = closing.line(patience);
        let seen = match answer {
            Ok(line) if line == "+PONG" => Ok(format!("after {}", in_ms(begun.elapsed()))),
            other => Err(format!("{other:?}")),
        };
        self.stage.check("the policy back, the same connection goes on with what it was sending", seen);
        Ok(())
    }

    /// Act 5, second part.
    fn without_agents(&self) -> anyhow::Result<()> {
        self.stage.line("");
        self.stage
            .text("Both agents are killed (kill -9) while ui fetches pages, each on a new connection, then started.");
        let web: Result<Vec<SocketAddr>, _> =
            [true, false].into_iter().map(|v4| self.address(&self.web, 80, v4)).collect();
        let web = web?;
        let kept = "a connection from before answers meanwhile";
        let patience = self.lab.patience();
        let mut held = match Held::open(&self.web.netns, self.address(&self.redis, 6379, false)?, patience) {
            Ok(held) => held,
            Err(error) => {
                self.stage.check(kept, Err(format!("{error:#}")));
                return Ok(());
            }
        };
        let stop = AtomicBool::new(false);
        let (ended, requests) = channel();
        let (steady, outcome) = std::thread::scope(|scope| {
            let (netns, web, stop) = (&self.ui.netns, &web, &stop);
            let stream = scope.spawn(move || traffic::steady(netns, web, patience, stop, &ended));
            let outcome = self.kill_and_restart(&mut held, &requests);
            stop.store(true, Ordering::Relaxed);
            (stream.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), outcome)
        });
        let (steady, (away, answer)) = (steady?, outcome?);
        let failed: usize = steady.failed.values().sum();
        let detail = format!(
            "{} requests, the slowest {}, agents away for {}",
            steady.requests,
            in_ms(steady.slowest),
            in_ms(away)
        );
        let seen = if failed == 0 && steady.requests > 0 {
            Ok(detail)
        } else {
            let reasons: Vec<String> =
                steady.failed.iter().map(|(reason, count)| format!("{count} × {reason}")).collect();
            Err(format!("{failed} of {} requests failed\n{}", steady.requests, reasons.join("\n")))
        };
        self.stage.check("not one request fails while there is no agent, nor when it returns", seen);
        let seen = match answer {
            Ok(line) if line == "+PONG" => Ok(String::new()),
            other => Err(format!("{other:?}")),
        };
        self.stage.check(kept, seen);
        let reached = self.reached(allowed)?;
        self.stage.check(
            &format!("after it, the same {} connections pass or do not, as before", reached.len()),
            compare(&reached, allowed).map(|()| String::new()),
        );
        Ok(())
    }

    /// How long there was no agent, and what the held connection answered meanwhile.
    fn kill_and_restart(
        &self,
        held: &mut Held,
        requests: &Receiver<()>,
    ) -> anyhow::Result<(Duration, std::io::Result<String>)> {
        self.await_requests(requests)?;
        let agents: Vec<_> = self.lab.nodes.iter().filter_map(|node| self.lab.agent_process(&node.name)).collect();
        let begun = Instant::now();
        process::kill(&agents)?;
        self.await_requests(requests)?;
        let answer = held.redis("PING", self.lab.patience());
        let (lab, interrupt) = (&self.lab, self.interrupt);
        cluster::each_node(lab, |node| agent::start(lab, node, interrupt))?;
        let away = begun.elapsed();
        cluster::settle(lab, lab.patience(), interrupt)?;
        self.await_requests(requests)?;
        Ok((away, answer))
    }

    /// Waits until [`STRETCH`] requests of the steady stream have ended from now on.
    fn await_requests(&self, ended: &Receiver<()>) -> anyhow::Result<()> {
        while ended.try_recv().is_ok() {}
        let mut missing = STRETCH;
        while missing > 0 {
            self.may_go_on()?;
            match ended.recv_timeout(INTERRUPT_CHECK) {
                Ok(()) => missing -= 1,
                // Slow requests have a limit of their own, and are counted as failed then.
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => anyhow::bail!("the client stopped asking"),
            }
        }
        Ok(())
    }

    /// The last check: what ran beside all acts still does.
    fn all_the_while(&self) -> anyhow::Result<()> {
        self.stage.line("");
        let mut problems = Vec::new();
        for pod in self.lab.pods()? {
            for (name, process) in pod.programs(&self.lab) {
                if process.is_none() {
                    let log = self.lab.pod_directory(&pod.key).join(format!("{name}.log"));
                    problems.push(format!("{}: {name} has ended{}", pod.key, pods::quote(&log)));
                }
            }
            if !pods::is_attached(&pod) {
                problems.push(format!("{} has no device", pod.key));
            }
        }
        for (pod, program, does) in
            [("shop/web", "visits", COUNTS), ("front/app", "get", WELCOMES), ("front/ui", "get", WELCOMES)]
        {
            problems.extend(self.program_does(pod, program, does)?.err());
        }
        let seen = if problems.is_empty() { Ok(String::new()) } else { Err(problems.join("\n")) };
        self.stage.check("all the while the pods' own programs ran, and those that may get answers still do", seen);
        Ok(())
    }

    /// Waits until a pod's own program writes something like this from now on; says what.
    fn program_does(&self, pod: &str, program: &str, does: Does) -> anyhow::Result<Result<String, String>> {
        let pod = self.lab.pod(&pod.parse().map_err(anyhow::Error::msg)?)?;
        let deadline = crate::span::from_now(self.lab.patience());
        let line = pods::await_line(&self.lab, &pod, program, does.is, deadline, self.interrupt)?;
        Ok(match line {
            Some(line) => Ok(format!("{} {}", pod.key, (does.words)(&line))),
            None => {
                let log = self.lab.pod_directory(&pod.key).join(format!("{program}.log"));
                Err(format!("{}: {program} has not {}{}", pod.key, does.name, pods::quote(&log)))
            }
        })
    }

    /// Every client asks every server; whom the policies do not allow is dropped, and the agent of the server's node
    /// says so.
    fn reached(&self, allowed: impl Fn(&str, &str) -> bool) -> anyhow::Result<Vec<Reach>> {
        let since = now();
        let (lab, interrupt) = (&self.lab, self.interrupt);
        let nodes = [("web", self.web.node.as_str()), ("redis", self.redis.node.as_str())];
        let dropped = |(client, server, address): Cell<'_>| {
            let node = nodes.iter().find(|(service, _)| *service == server.service).map_or("", |(_, node)| node);
            let world = underlay::WORLD.into_iter().find(|world| world.is_ipv4() == address.is_ipv4());
            let from = match world {
                Some(world) if client.name == "world" => world.to_string(),
                _ => client.name.clone(),
            };
            let mut filter = ends(&from, &address.to_string(), "dropped");
            filter.reason = vec!["POLICY_DENIED".to_owned()];
            find_flow(lab, node, since, filter, LOOK, interrupt).map(|flow| flow.is_some())
        };
        let reached = traffic::everyone(&self.clients, &self.servers, lab.patience(), allowed, dropped)?;
        self.may_go_on()?;
        Ok(reached)
    }

    /// Changes the store; how long until every node enforced it.
    fn change(&self, change: &Change) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        cluster::change(&self.lab, change)?;
        cluster::settle_once(&self.lab, self.lab.patience(), self.interrupt)?;
        Ok(begun.elapsed())
    }

    fn drop_seen(&self, flow: Option<Flow>, expected: &str) {
        let seen = match flow {
            None => Err("no such flow".to_owned()),
            Some(flow) => {
                let denied = flow.drop.as_ref().is_some_and(|drop| drop.name == "POLICY_DENIED" && drop.code == 133);
                let implicit = flow.deciding_rule().is_some_and(|rule| rule.kind == RuleKind::DefaultDeny);
                let expected = flow.verdict == Verdict::Dropped && denied && implicit;
                let record = Record::Flow(Box::new(flow));
                self.stage.text(&cirri_flow::compact_with(&record, self.stage.colours()));
                if expected { Ok(String::new()) } else { Err(cirri_flow::compact(&record)) }
            }
        };
        self.stage.check(expected, seen);
    }

    /// The first flow that matches and was seen at `since` or later; none if none comes in time.
    fn flow(&self, node: &str, since: u64, filter: Filter) -> anyhow::Result<Option<Flow>> {
        let found = find_flow(&self.lab, node, since, filter, self.lab.patience(), self.interrupt)?;
        self.may_go_on()?;
        Ok(found)
    }

    /// What `policy explain` says of a connection that was tried.
    fn predicted(&self, tried: &Reach) -> anyhow::Result<Reach> {
        let (pod, port) = if tried.service == "web" { (&self.web, 80) } else { (&self.redis, 6379) };
        let world = underlay::WORLD.into_iter().find(|address| address.is_ipv4() == (tried.family == 4));
        let from = match world {
            Some(world) if tried.from == "world" => world.to_string(),
            _ => tried.from.clone(),
        };
        let answer = self.explain(&pod.node, &from, &tried.address.to_string(), port)?;
        let outcome = match answer.verdict.as_str() {
            "allow" => Outcome::Works,
            "deny" => Outcome::Denied,
            _ => Outcome::Unclear(format!("{answer:?}")),
        };
        Ok(Reach { outcome, ..tried.clone() })
    }

    fn explain(&self, node: &str, from: &str, to: &str, port: u16) -> anyhow::Result<Explanation> {
        let question = PolicyExplain { from: from.to_owned(), to: to.to_owned(), port, proto: "TCP".to_owned() };
        client::call(&self.lab.agent_socket(node), "policy.explain", &question, self.lab.patience())
            .with_context(|| format!("the agent of {node}"))
    }

    fn address(&self, pod: &PodRecord, port: u16, v4: bool) -> anyhow::Result<SocketAddr> {
        let address = pod.addresses.iter().find(|address| address.is_ipv4() == v4);
        Ok(SocketAddr::new(*address.with_context(|| format!("pod {} lacks an address", pod.key))?, port))
    }
}

/// What a pod's own program is for.
#[derive(Clone, Copy)]
struct Does {
    /// Whether a line of its log shows it.
    is: fn(&str) -> bool,
    /// The line in words.
    words: fn(&str) -> String,
    /// What it has then done.
    name: &'static str,
}

const COUNTS: Does = Does {
    is: |line| line.parse::<u64>().is_ok_and(|visits| visits > 0),
    words: |line| format!("sees {line} visits"),
    name: "counted",
};
const WELCOMES: Does =
    Does { is: |line| line == traffic::GREETING, words: |_| "gets its page".to_owned(), name: "got its page" };

/// The first flow that matches and was seen at `since` or later, also one that comes later; none if none comes within
/// `wait`.
fn find_flow(
    lab: &Lab,
    node: &str,
    since: u64,
    filter: Filter,
    wait: Duration,
    interrupt: &Interrupt,
) -> anyhow::Result<Option<Flow>> {
    let question = Observe { follow: true, last: Some(usize::MAX >> 1), filter };
    let deadline = crate::span::from_now(wait);
    loop {
        let mut found = None;
        // In slices, so that an interruption does not have to wait for the whole of it.
        let slice = deadline.saturating_duration_since(Instant::now()).clamp(LEAST_LOOK, LOOK);
        let outcome = client::stream(&lab.agent_socket(node), "observe", &question, Some(slice), |value| {
            let record = serde_json::from_value(value).map_err(|error| CallError::Garbled(error.to_string()))?;
            if let Record::Flow(flow) = record
                && flow.time_ns >= since
            {
                found = Some(*flow);
                return Err(CallError::Stop(Error::new(Failure::Failed, "found")));
            }
            Ok(())
        });
        match outcome {
            Ok(()) | Err(CallError::Stop(_)) => {}
            Err(CallError::Busy(_)) => {}
            Err(error) => return Err(error).with_context(|| format!("the agent of {node}")),
        }
        interrupt.check()?;
        if found.is_some() || Instant::now() >= deadline {
            return Ok(found);
        }
    }
}

/// What the policies say.
fn allowed(from: &str, service: &str) -> bool {
    match service {
        "web" => from.starts_with("front/"),
        _ => from == "shop/web",
    }
}

/// Whether every connection went as expected; if not, which ones did not.
fn compare(cells: &[Reach], expected: impl Fn(&str, &str) -> bool) -> Result<(), String> {
    let wrong: Vec<String> = cells
        .iter()
        .filter(|cell| match &cell.outcome {
            Outcome::Works => !expected(&cell.from, cell.service),
            Outcome::Denied => expected(&cell.from, cell.service),
            Outcome::Unclear(_) => true,
        })
        .map(|cell| {
            let what = match &cell.outcome {
                Outcome::Works => "it works",
                Outcome::Denied => "it is denied",
                Outcome::Unclear(why) => why,
            };
            format!("{} → {} ({}): {what}", cell.from, cell.service, cell.address)
        })
        .collect();
    if wrong.is_empty() { Ok(()) } else { Err(wrong.join("\n")) }
}

fn ends(from: &str, to: &str, verdict: &str) -> Filter {
    let one = |text: &str| vec![text.to_owned()];
    Filter { from: one(from), to: one(to), verdict: one(verdict), ..Filter::default() }
}

fn parse(file: &str, text: &str) -> anyhow::Result<Vec<Resource>> {
    Ok(parse_documents(file, text)?)
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_nanos().try_into().unwrap_or(u64::MAX)
}

fn in_ms(time: Duration) -> String {
    format!("{:.0} ms", time.as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::logs;

    #[test]
    fn the_manifests_hold_what_the_acts_speak_of() {
        let pods = parse("pods.yaml", PODS).unwrap();
        assert_eq!(pods.iter().filter(|resource| matches!(resource, Resource::Pod(_))).count(), 6);
        let keys: Vec<String> = parse("policies.yaml", POLICIES).unwrap().iter().map(Resource::store_key).collect();
        assert!(keys.contains(&"resources/NetworkPolicy/shop/redis-from-web".to_owned()), "{keys:?}");
        assert_eq!(keys.len(), 3);
    }

    #[test]
    fn the_pods_programs_look_for_the_addresses_where_they_are() {
        let lab = Lab::described(&"t".parse().unwrap(), &["n".into()], Routing::Overlay, &[]);
        let work = lab.pod_directory(&"shop/web".parse().unwrap()).join(logs::WORK);
        let up = work.strip_prefix(lab.name.directory()).unwrap().components().count();
        let from_work = format!("{}{ADDRESSES}", "../".repeat(up));
        let reads = PODS.matches("../addresses").count();
        assert_eq!(PODS.matches(&format!(" {from_work}")).count(), reads, "{from_work}");
        assert_eq!(reads, 10, "five programs look for it, then read it");
    }

    #[test]
    fn what_a_program_is_for_is_told_from_what_it_says_in_vain() {
        assert!((COUNTS.is)("17") && (WELCOMES.is)("welcome to the shop"));
        for other in ["", "Could not connect to Redis at 10.0.0.1:6379", "0", "OK", "-1"] {
            assert!(!(COUNTS.is)(other) && !(WELCOMES.is)(other), "{other}");
        }
    }

    #[test]
    fn a_connection_that_should_not_work_is_named() {
        let cell = |from: &str, outcome| Reach {
            from: from.into(),
            service: "redis",
            address: IpAddr::from([10, 0, 0, 1]),
            family: 4,
            outcome,
        };
        let cells = [
            cell("shop/web", Outcome::Works),
            cell("guest/scan", Outcome::Works),
            cell("front/ui", Outcome::Denied),
            cell("front/app", Outcome::Unclear("silence".into())),
        ];
        assert_eq!(
            compare(&cells, allowed).unwrap_err(),
            "guest/scan → redis (10.0.0.1): it works\nfront/app → redis (10.0.0.1): silence",
            "silence that no drop explains is no denial"
        );
        let denied = compare(&[cell("shop/web", Outcome::Denied)], allowed).unwrap_err();
        assert_eq!(denied, "shop/web → redis (10.0.0.1): it is denied");
        assert_eq!(compare(&cells[..1], allowed), Ok(()));
    }
}
