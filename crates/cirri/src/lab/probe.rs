//! `cirri lab probe`: who reaches whom, found out by trying.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, bail};
use serde::Serialize;

use super::echo::{Port, Transport};
use super::prober::{self, Job, Outcome, Patience, Verdict};
use super::state::{DEFAULT_NAME, Lab, LabName, PodKey, PodRecord};
use super::up::WORLD_PORTS;
use super::{EXIT_DENIED, matrix, netns, underlay};
use crate::output::{self, OutputArgs};

/// Arguments of `cirri lab probe`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  cirri lab probe --from shop/client --to shop/db --port 5432
  cirri lab probe --from shop/client --to 198.51.100.10 --proto icmp
  cirri lab probe --from world --to shop/web --port 80 --family 6
  cirri lab probe --all-pairs
  cirri lab probe --all-pairs --ports 80/tcp,53/udp --with-world -o json

A probe is allowed when an answer comes back, denied when there is silence, an error otherwise (nothing listens, no
route). Exit code of a single probe: 0 if every family got through, 4 if not. --all-pairs exits 0 whatever it finds.")]
pub struct ProbeArgs {
    /// The lab.
    #[arg(long, default_value = DEFAULT_NAME)]
    name: LabName,
    /// From where: NAMESPACE/POD, node:NAME, world, or world@ADDRESS for another address of the outside host.
    #[arg(long, required_unless_present = "all_pairs", conflicts_with = "all_pairs")]
    from: Option<End>,
    /// Where to: NAMESPACE/POD, node:NAME, world or an IP address.
    #[arg(long, required_unless_present = "all_pairs", conflicts_with = "all_pairs")]
    to: Option<End>,
    /// The port (not for icmp).
    #[arg(long, conflicts_with = "all_pairs")]
    port: Option<u16>,
    /// The protocol.
    #[arg(long, value_enum, default_value = "tcp", conflicts_with = "all_pairs")]
    proto: Transport,
    /// The address families to try.
    #[arg(long, value_enum, default_value = "both")]
    family: Family,
    /// How long one try waits, in milliseconds.
    #[arg(long, default_value_t = 700, value_name = "MS")]
    timeout: u64,
    /// How often silence is tried again.
    #[arg(long, default_value_t = 1)]
    retries: u32,
    /// From every pod to every pod.
    #[arg(long)]
    all_pairs: bool,
    /// The ports of --all-pairs, as 80/tcp,53/udp,icmp; each pod's own ports if absent.
    #[arg(long, value_delimiter = ',', requires = "all_pairs")]
    ports: Vec<Port>,
    /// With --all-pairs: the outside host too, in both roles.
    #[arg(long, requires = "all_pairs")]
    with_world: bool,
    /// With --all-pairs: the nodes too, as sources.
    #[arg(long, requires = "all_pairs")]
    with_nodes: bool,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Family {
    #[value(name = "4")]
    V4,
    #[value(name = "6")]
    V6,
    Both,
}

impl Family {
    fn has(self, address: IpAddr) -> bool {
        match self {
            Self::V4 => address.is_ipv4(),
            Self::V6 => address.is_ipv6(),
            Self::Both => true,
        }
    }
}

/// One end of a probe as the user names it.
#[derive(Clone, Debug)]
enum End {
    Pod(PodKey),
    Node(String),
    World(Option<IpAddr>),
    Address(IpAddr),
}

impl FromStr for End {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "world" {
            return Ok(Self::World(None));
        }
        if let Some(address) = text.strip_prefix("world@") {
            return address
                .parse()
                .map(|address| Self::World(Some(address)))
                .map_err(|_| format!("\"{address}\" is not an address: write world@198.51.100.20"));
        }
        if let Some(node) = text.strip_prefix("node:") {
            return Ok(Self::Node(node.to_owned()));
        }
        if let Ok(address) = text.parse() {
            return Ok(Self::Address(address));
        }
        text.parse().map(Self::Pod)
    }
}

/// One answer, the unit of `-o json`.
#[derive(Clone, Debug, Serialize)]
pub struct Cell {
    /// The source, as `namespace/pod`, `node:name` or `world`.
    pub source: String,
    /// The destination, likewise, or an address.
    pub destination: String,
    /// The address that was tried.
    pub address: IpAddr,
    /// The port; absent for ICMP.
    pub port: Option<u16>,
    /// The protocol.
    pub protocol: Transport,
    /// 4 or 6.
    pub family: u8,
    /// What came of it.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// A party that can ask or be asked.
#[derive(Clone, Debug)]
struct Party {
    name: String,
    /// Where it asks from; absent for a bare address, which can only be asked.
    netns: Option<PathBuf>,
    addresses: Vec<IpAddr>,
    /// The ports it declares.
    ports: BTreeSet<Port>,
    /// Those of them that the echo server answers on.
    echo: BTreeSet<Port>,
    /// The address it asks from, if that was chosen.
    source: Option<IpAddr>,
}

/// Probes as asked and prints the result.
///
/// # Errors
/// No such lab, pod or node; a source whose namespace cannot be entered.
pub fn run(args: ProbeArgs) -> anyhow::Result<ExitCode> {
    let lab = Lab::load(&args.name)?;
    let patience = Patience { timeout: Duration::from_millis(args.timeout), retries: args.retries };
    let (sources, targets, ports) = if args.all_pairs {
        let (sources, targets) = everyone(&lab, &args)?;
        (sources, targets, args.ports.clone())
    } else {
        // Both are there: clap asks for them unless --all-pairs is given.
        let (from, to) =
            (args.from.as_ref().context("--from is missing")?, args.to.as_ref().context("--to is missing")?);
        if let End::Address(address) = from {
            bail!("--from {address}: an address can only be asked; name a pod, node:NAME, world or world@ADDRESS");
        }
        (vec![party(&lab, from)?], vec![party(&lab, to)?], vec![asked_port(&args)?])
    };
    let questions = questions(&sources, &targets, &ports, args.family);
    if questions.is_empty() {
        bail!("nothing to probe: no pod has ports or addresses for this (give --ports, see `cirri lab list`)");
    }
    let cells = ask(questions, patience)?;
    output::print(args.output.output, &cells, |cells| {
        if args.all_pairs { matrix::render(cells) } else { matrix::lines(cells) }
    })?;
    let through = cells.iter().all(|cell| cell.outcome.verdict == Verdict::Allowed);
    Ok(if args.all_pairs || through { ExitCode::SUCCESS } else { ExitCode::from(EXIT_DENIED) })
}

fn asked_port(args: &ProbeArgs) -> anyhow::Result<Port> {
    match (args.proto, args.port) {
        (Transport::Icmp, None) => Ok(Port { number: 0, protocol: Transport::Icmp }),
        (Transport::Icmp, Some(_)) => bail!("icmp has no ports: leave --port out"),
        (_, None | Some(0)) => bail!("which port? Give --port NUMBER"),
        (protocol, Some(number)) => Ok(Port { number, protocol }),
    }
}

fn everyone(lab: &Lab, args: &ProbeArgs) -> anyhow::Result<(Vec<Party>, Vec<Party>)> {
    let pods = lab.pods()?;
    if pods.is_empty() {
        bail!("the lab \"{0}\" has no pods: put some in with `cirri lab apply --name {0} -f DIR --wait`", lab.name);
    }
    let mut targets: Vec<Party> = pods.iter().map(Party::pod).collect();
    if args.with_world {
        targets.push(party(lab, &End::World(None))?);
    }
    let mut sources = targets.clone();
    if args.with_nodes {
        for node in &lab.nodes {
            sources.push(party(lab, &End::Node(node.name.clone()))?);
        }
    }
    Ok((sources, targets))
}

fn party(lab: &Lab, end: &End) -> anyhow::Result<Party> {
    match end {
        End::Pod(key) => lab.pod(key).map(|pod| Party::pod(&pod)),
        End::Node(name) => {
            let node = lab.node(name)?;
            let addresses = vec![node.ipv4.into(), node.ipv6.into()];
            Ok(Party { netns: Some(node.netns.clone()), ..Party::silent(format!("node:{name}"), addresses) })
        }
        End::World(source) => {
            if let Some(source) = source.filter(|source| !underlay::WORLD.contains(source)) {
                let all: Vec<String> = underlay::WORLD.iter().map(IpAddr::to_string).collect();
                bail!("the outside host has no address {source}; it has {}", all.join(", "));
            }
            let name = source.map_or("world".to_owned(), |source| format!("world@{source}"));
            let addresses = source.map_or(underlay::WORLD[..2].to_vec(), |source| vec![source]);
            let netns = Some(netns::path(&lab.name.world_namespace()));
            // It answers on more; a matrix that asks for nothing in particular needs one of each protocol.
            let ports = WORLD_PORTS.into_iter().filter(|port| matches!(port.number, 53 | 80)).collect();
            let echo = WORLD_PORTS.into_iter().collect();
            Ok(Party { netns, echo, ports, source: *source, ..Party::silent(name, addresses) })
        }
        End::Address(address) => Ok(Party::silent(address.to_string(), vec![*address])),
    }
}

impl Party {
    fn silent(name: String, addresses: Vec<IpAddr>) -> Self {
        Self { name, netns: None, addresses, ports: BTreeSet::new(), echo: BTreeSet::new(), source: None }
    }

    fn pod(pod: &PodRecord) -> Self {
        let ports = |echo_only: bool| {
            pod.spec
                .containers
                .iter()
                .filter(move |container| !echo_only || container.is_echo())
                .flat_map(|container| container.ports.iter().copied())
                .collect()
        };
        Self {
            netns: Some(pod.netns.clone()),
            ports: ports(false),
            echo: ports(true),
            ..Self::silent(pod.key.to_string(), pod.addresses.clone())
        }
    }
}

/// All questions, grouped by source: its namespace, and for each job the cell it will fill.
fn questions(
    sources: &[Party],
    targets: &[Party],
    ports: &[Port],
    family: Family,
) -> Vec<(PathBuf, Vec<(Question, Job)>)> {
    let mut all = Vec::new();
    for source in sources {
        let Some(netns) = &source.netns else { continue };
        let mut asked = Vec::new();
        for target in targets {
            let own: Vec<Port> = target.ports.iter().copied().collect();
            for port in if ports.is_empty() { &own } else { ports } {
                for address in target.addresses.iter().filter(|address| family.has(**address)) {
                    if source.source.is_some_and(|source| source.is_ipv4() != address.is_ipv4()) {
                        continue;
                    }
                    let job =
                        Job { to: *address, port: *port, source: source.source, echo: target.echo.contains(port) };
                    asked.push((Question { from: source.name.clone(), to: target.name.clone() }, job));
                }
            }
        }
        if !asked.is_empty() {
            all.push((netns.clone(), asked));
        }
    }
    all
}

struct Question {
    from: String,
    to: String,
}

/// Asks all questions, each source on a thread in its own namespace.
fn ask(questions: Vec<(PathBuf, Vec<(Question, Job)>)>, patience: Patience) -> anyhow::Result<Vec<Cell>> {
    super::echo::raise_file_limit();
    let answers: Vec<anyhow::Result<Vec<Cell>>> = std::thread::scope(|scope| {
        let asking: Vec<_> = questions
            .into_iter()
            .map(|(netns, asked)| scope.spawn(move || ask_from(&netns, asked, patience)))
            .collect();
        asking.into_iter().map(|one| one.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    let mut cells = Vec::new();
    for answer in answers {
        cells.extend(answer?);
    }
    Ok(cells)
}

fn ask_from(netns: &std::path::Path, asked: Vec<(Question, Job)>, patience: Patience) -> anyhow::Result<Vec<Cell>> {
    let jobs: Vec<Job> = asked.iter().map(|(_, job)| job.clone()).collect();
    let outcomes = netns::within_async(netns, || prober::probe_all(jobs, patience))?;
    let cells = asked.into_iter().zip(outcomes).map(|((question, job), outcome)| Cell {
        source: question.from,
        destination: question.to,
        address: job.to,
        port: (job.port.protocol != Transport::Icmp).then_some(job.port.number),
        protocol: job.port.protocol,
        family: if job.to.is_ipv4() { 4 } else { 6 },
        outcome,
    });
    Ok(cells.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_told_apart() {
        assert!(matches!("world".parse(), Ok(End::World(None))));
        assert!(matches!("world@198.51.100.20".parse(), Ok(End::World(Some(_)))));
        assert!(matches!("node:node1".parse(), Ok(End::Node(_))));
        assert!(matches!("fd00::1".parse(), Ok(End::Address(_))));
        assert!(matches!("shop/web".parse(), Ok(End::Pod(_))));
        assert!("world@here".parse::<End>().is_err());
    }

    #[test]
    fn every_port_is_asked_in_each_family_unless_the_source_has_only_one() {
        let addresses: Vec<IpAddr> = vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()];
        let port: Port = "80/tcp".parse().unwrap();
        let target = Party {
            netns: Some("/run/netns/x".into()),
            ports: [port].into(),
            echo: [port].into(),
            ..Party::silent("a/b".into(), addresses)
        };
        let count = |source: &Party, ports: &[Port], family| -> usize {
            questions(std::slice::from_ref(source), std::slice::from_ref(&target), ports, family)
                .iter()
                .map(|(_, asked)| asked.len())
                .sum()
        };
        assert_eq!(count(&target, &[], Family::Both), 2);
        assert_eq!(count(&target, &[port, "53/udp".parse().unwrap()], Family::V6), 2);
        let bound = Party { source: Some("198.51.100.20".parse().unwrap()), ..target.clone() };
        assert_eq!(count(&bound, &[], Family::Both), 1);
    }
}
