//! `cirri bench traffic`: real connections, requests and bulk data between pods of a lab, beside
//! plain kernel routing in the same rounds.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use cirri_abi::node_flag;
use cirri_loader::Tables;
use serde::Serialize;

use super::group::Home;
use super::labs::{self, BenchLab};
use super::load::{self, Mode, Server, Window};
use super::plain::{self, Plain};
use super::stats;
use crate::output::{self, Table};

/// How much to measure.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub rounds: usize,
    pub window: Duration,
    /// The processor of both ends.
    pub cpu: usize,
}

/// One way and one mode, over all rounds.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    pub way: &'static str,
    pub mode: Mode,
    /// Operations a second; for bulk, bits a second.
    pub rate_best: f64,
    pub rate_median: f64,
    /// Microseconds, medians of the rounds; 0 for bulk.
    pub p50: f64,
    pub p99: f64,
    /// Processor time an operation (us; for bulk s/GB), the least of all rounds.
    pub cpu: f64,
    /// The way that it is compared with.
    pub beside: &'static str,
    /// Median over the rounds of this rate over that of `beside` in the same round.
    pub rate_ratio: f64,
    /// Least over least.
    pub cpu_ratio: f64,
}

/// A way that traffic takes.
pub struct Way {
    pub name: &'static str,
    pub beside: &'static str,
    pub client: PathBuf,
    pub server: usize,
    /// The address to use instead of the server's own.
    pub service: Option<SocketAddr>,
    /// The control group that the client's sockets belong to; `None`: this process's own.
    pub group: Option<PathBuf>,
    /// Whether connections are reported; `None` if nothing of Cirri is there.
    pub visible: Option<bool>,
    pub modes: &'static [Mode],
}

/// A way through a lab: name, what it is beside, the server's pod, whether connections are reported.
type LabWay = (&'static str, &'static str, &'static str, bool, &'static [Mode]);

const ALL: &[Mode] = &[Mode::Connections, Mode::Requests, Mode::Bulk];
pub const SHORT: &[Mode] = &[Mode::Connections, Mode::Requests];

const OVERLAY: &[LabWay] = &[
    ("overlay-near", "plain-near", "near", true, ALL),
    ("overlay-near-1000-rules", "overlay-near", "near1000", true, SHORT),
    ("overlay-near-unreported", "overlay-near", "near", false, SHORT),
    ("overlay-far", "plain-vxlan-far", "far", true, ALL),
];
const DIRECT: &[LabWay] = &[
    ("direct-near", "plain-near", "near", true, ALL),
    ("direct-far", "plain-far", "far", true, ALL),
    ("direct-far-1000-rules", "direct-far", "far1000", true, SHORT),
    ("direct-far-unreported", "direct-far", "far", false, SHORT),
];

/// Measures everything.
pub fn run(pin_root: &Path, plan: &Plan) -> Result<Vec<Line>> {
    super::instance::sweep(pin_root);
    let plain = Plain::up()?;
    let mut servers = Vec::new();
    let mut ways = Vec::new();
    for (name, beside, pod, address) in [
        ("plain-near", "plain-near", "near", plain::NEAR),
        ("plain-far", "plain-far", "far", plain::FAR),
        ("plain-vxlan-far", "plain-far", "far", plain::FAR_BY_VXLAN),
    ] {
        let client = plain.netns("client");
        let server = servers.len();
        ways.push(Way { name, beside, client, server, service: None, group: None, visible: None, modes: ALL });
        servers.push(Server::start(&plain.netns(pod), address.into(), plan.cpu)?);
    }
    let labs = [(lab("o", "overlay")?, OVERLAY), (lab("d", "direct")?, DIRECT)];
    let mut tables = Vec::new();
    for (lab, lab_ways) in &labs {
        let info = lab.info()?;
        let mut there: Vec<(&str, usize)> = Vec::new();
        for (name, beside, pod, visible, modes) in *lab_ways {
            let server = match there.iter().find(|(known, _)| known == pod) {
                Some((_, server)) => *server,
                None => {
                    let (netns, ip) = info.pod(pod)?;
                    servers.push(Server::start(&netns, ip, plan.cpu)?);
                    there.push((pod, servers.len() - 1));
                    servers.len() - 1
                }
            };
            let (client, _) = info.pod("client")?;
            let visible = Some(*visible);
            ways.push(Way { name, beside, client, server, service: None, group: None, visible, modes });
        }
        for instance in lab.instances(pin_root)? {
            tables.push(Tables::open(pin_root, &instance)?);
        }
    }
    measure(plan, &ways, &servers, &tables)
}

/// Two nodes: a client with two servers on the first, two servers on the second.
fn lab(tag: &str, routing: &str) -> Result<BenchLab> {
    eprintln!("cirri: bringing up a lab ({routing})");
    let lab = BenchLab::up(tag, 2, routing)?;
    let pods = [
        labs::pod("client", "node1", "client"),
        labs::pod("near", "node1", "one"),
        labs::pod("near1000", "node1", "thousand"),
        labs::pod("far", "node2", "one"),
        labs::pod("far1000", "node2", "thousand"),
    ];
    let policies = [labs::policy("one", "one", 1), labs::policy("thousand", "thousand", 1000)];
    lab.write("all.yaml", &format!("{}{}{}", labs::NAMESPACE, pods.concat(), policies.concat()))?;
    lab.apply()?;
    Ok(lab)
}

/// Lets all ways take turns.
pub fn measure(plan: &Plan, ways: &[Way], servers: &[Server], tables: &[Tables]) -> Result<Vec<Line>> {
    let mut home = Home::new()?;
    for way in ways {
        home.enter(way.group.as_deref())?;
        let server = servers.get(way.server).context("a way without a server")?;
        load::await_reachable(&way.client, server, way.service).with_context(|| way.name)?;
    }
    let mut windows: Vec<(&Way, Mode, Vec<Window>)> =
        ways.iter().flat_map(|way| way.modes.iter().map(move |mode| (way, *mode, Vec::new()))).collect();
    eprintln!("cirri: {} windows in each of {} rounds", windows.len(), plan.rounds);
    for _ in 0..plan.rounds {
        for (way, mode, done) in &mut windows {
            if let Some(visible) = way.visible {
                report_connections(tables, visible)?;
            }
            let server = servers.get(way.server).context("a way without a server")?;
            home.enter(way.group.as_deref())?;
            let window = load::run(&way.client, server, way.service, *mode, plan.window, plan.cpu);
            done.push(window.with_context(|| way.name)?);
        }
    }
    report_connections(tables, true)?;
    let of = |name: &str, mode: Mode| windows.iter().find(|(way, its, _)| way.name == name && *its == mode);
    let line = |(way, mode, done): &(&Way, Mode, Vec<Window>)| {
        let (_, _, base) = of(way.beside, *mode).with_context(|| format!("{} was not measured", way.beside))?;
        let values = |of: fn(&Window) -> f64| done.iter().map(of).collect::<Vec<f64>>();
        let median = |values: &[f64]| stats::quantile(values, 0.5).unwrap_or_default();
        let least = |windows: &[Window]| windows.iter().map(|window| window.cpu).fold(f64::INFINITY, f64::min);
        let ratios: Vec<f64> = done.iter().zip(base).map(|(own, base)| own.rate / base.rate).collect();
        Ok(Line {
            way: way.name,
            mode: *mode,
            rate_best: values(|window| window.rate).into_iter().fold(0.0, f64::max),
            rate_median: median(&values(|window| window.rate)),
            p50: median(&values(|window| window.p50)),
            p99: median(&values(|window| window.p99)),
            cpu: least(done),
            beside: way.beside,
            rate_ratio: median(&ratios),
            cpu_ratio: least(done) / least(base),
        })
    };
    windows.iter().map(line).collect()
}

/// Lets the packet path of every node report connections, or drops only.
fn report_connections(tables: &[Tables], yes: bool) -> Result<()> {
    for tables in tables {
        let mut node = tables.node()?;
        let flags = if yes { node.flags & !node_flag::DROPS_ONLY } else { node.flags | node_flag::DROPS_ONLY };
        if flags != node.flags {
            node.flags = flags;
            tables.set_node(&node)?;
        }
    }
    Ok(())
}

/// As columns.
pub fn table(lines: &[Line]) -> String {
    let mut table =
        Table::new(["way", "mode", "median", "best", "p50 us", "p99 us", "cpu", "beside", "rate", "cpu ratio"]);
    for line in lines {
        let Shown { median, best, cpu } = shown(line);
        table.row([
            line.way.to_owned(),
            mode_name(line.mode).to_owned(),
            median,
            best,
            format!("{:.0}", line.p50),
            format!("{:.0}", line.p99),
            cpu,
            line.beside.to_owned(),
            format!("{:.2}", line.rate_ratio),
            format!("{:.2}", line.cpu_ratio),
        ]);
    }
    table.render(output::terminal_width())
}

/// The table of a report.
pub fn write_rows(lines: &[Line], text: &mut String) {
    text.push_str(
        "| way | mode | median | best | p50 µs | p99 µs | cpu | beside | rate | cpu |\n|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for it in lines {
        let Shown { median, best, cpu } = shown(it);
        let Line { way, beside, p50, p99, rate_ratio, cpu_ratio, .. } = it;
        let mode = mode_name(it.mode);
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "| {way} | {mode} | {median} | {best} | {p50:.0} | {p99:.0} | {cpu} | {beside} | {rate_ratio:.2} | {cpu_ratio:.2} |"
        );
    }
}

/// Figures with their units.
pub struct Shown {
    pub median: String,
    pub best: String,
    pub cpu: String,
}

/// What a line says, for people.
pub fn shown(line: &Line) -> Shown {
    if line.mode == Mode::Bulk {
        let rate = |bits: f64| format!("{:.1} Gbit/s", bits / 1e9);
        return Shown {
            median: rate(line.rate_median),
            best: rate(line.rate_best),
            cpu: format!("{:.2} s/GB", line.cpu),
        };
    }
    let rate = |each: f64| format!("{:.1}k/s", each / 1e3);
    Shown { median: rate(line.rate_median), best: rate(line.rate_best), cpu: format!("{:.1} us", line.cpu) }
}

/// The name that people see.
fn mode_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Connections => "connections",
        Mode::Requests => "requests",
        Mode::Bulk => "bulk",
    }
}
