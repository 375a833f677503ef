//! `cirri bench all`: everything, as JSON and as Markdown.

use std::fmt::Write as _;
use std::path::Path;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use serde::Serialize;

use super::control::{self, Control};
use super::packets::{self, Line, Measures, shown};
use super::services::{self, Services};
use super::stats::Spread;
use super::tenk::{self, TenK};
use super::traffic::{self, Line as Traffic};
use super::verify::{self, Bill};
use super::{cases, goals, sockets};

/// What is measured, and how much.
#[derive(Clone, Debug)]
pub struct Plan {
    pub packets: packets::Plan,
    pub sockets: sockets::Plan,
    pub services: services::Plan,
    pub tenk: tenk::Plan,
    pub traffic: traffic::Plan,
    pub control: control::Plan,
    pub quick: bool,
}

/// Everything that was measured in one go.
#[derive(Debug, Serialize)]
pub struct Report {
    date: String,
    kernel: String,
    machine: String,
    processors: usize,
    build: &'static str,
    quick: bool,
    /// One-minute load before and after: other work on the machine, and this.
    load: [f64; 2],
    rounds: usize,
    programs: Vec<Bill>,
    #[serde(flatten)]
    pub(super) measures: Option<Measures>,
    pub(super) sockets: Vec<sockets::Line>,
    pub(super) services: Option<Services>,
    pub(super) tenk: Option<TenK>,
    pub(super) traffic: Vec<Traffic>,
    control: Option<Control>,
}

/// Measures everything and writes `latest.json` and `README.md` into a directory, anew after each
/// part: what fails late does not lose what was measured before.
pub fn run(pin_root: &Path, plan: &Plan, out: &Path) -> Result<()> {
    std::fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    let before = load_average();
    let mut report = Report {
        programs: verify::run(pin_root)?,
        measures: None,
        sockets: Vec::new(),
        traffic: Vec::new(),
        services: None,
        tenk: None,
        control: None,
        date: date(),
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        machine: processor(),
        processors: std::thread::available_parallelism().map_or(1, usize::from),
        build: if cfg!(debug_assertions) { "debug" } else { "release" },
        quick: plan.quick,
        load: [before, before],
        rounds: plan.packets.rounds,
    };
    type Part = fn(&mut Report, &Path, &Plan) -> Result<()>;
    let parts: [(&str, Part); 6] = [
        ("packets", |report, root, plan| {
            report.measures = Some(packets::run(root, &plan.packets)?);
            Ok(())
        }),
        ("sockets", |report, root, plan| {
            report.sockets = sockets::run(root, &plan.sockets)?;
            Ok(())
        }),
        ("services", |report, root, plan| {
            report.services = Some(services::run(root, &plan.services)?);
            Ok(())
        }),
        ("ten thousand services", |report, _, plan| {
            report.tenk = Some(tenk::run(&plan.tenk)?);
            Ok(())
        }),
        ("traffic", |report, root, plan| {
            report.traffic = traffic::run(root, &plan.traffic)?;
            Ok(())
        }),
        ("control", |report, _, plan| {
            report.control = Some(control::run(&plan.control)?);
            Ok(())
        }),
    ];
    let mut failed = Ok(());
    for (name, part) in parts {
        let begun = Instant::now();
        if let Err(error) = part(&mut report, pin_root, plan).with_context(|| format!("{name} could not be measured")) {
            eprintln!("cirri: {error:#}");
            failed = failed.and(Err(error));
        }
        eprintln!("cirri: {name}: {:.0} s", begun.elapsed().as_secs_f64());
        report.load = [before, load_average()];
        report.write(out)?;
    }
    failed
}

impl Report {
    fn write(&self, out: &Path) -> Result<()> {
        let write = |name: &str, text: &str| {
            let path = out.join(name);
            std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
        };
        write("latest.json", &(serde_json::to_string_pretty(self)? + "\n"))?;
        write("README.md", &self.markdown())
    }

    fn markdown(&self) -> String {
        let mut text = self.head();
        goals::write(self, &mut text);
        self.packet_tables(&mut text);
        sockets::write(&self.sockets, &mut text);
        if let Some(services) = &self.services {
            services::write(services, &mut text);
        }
        if let Some(tenk) = &self.tenk {
            tenk::write(tenk, &mut text);
        }
        self.traffic_table(&mut text);
        self.control_table(&mut text);
        self.program_table(&mut text);
        text
    }

    fn head(&self) -> String {
        let quick = if self.quick { "**A quick run: to see that it works, not to quote.** " } else { "" };
        format!(
            "# What it costs\n\nWritten by `cargo xtask bench`; the figures as data: `latest.json`. {quick}\
             How to time the programs with another harness: [pin.md](pin.md).\n\n\
             {} · Linux {} · {} × {} · {} build · load average {:.1} before, {:.1} after: other work on the machine \
             is in the figures. Least and first quartile are what compares; the median shows the noise.\n",
            self.date, self.kernel, self.processors, self.machine, self.build, self.load[0], self.load[1]
        )
    }

    // === Tables ===

    fn packet_tables(&self, text: &mut String) {
        let Some(measures) = &self.measures else { return };
        let _ = write!(
            text,
            "\n## Nanoseconds a packet\n\nmin / p25 / median of {} interleaved rounds, by `BPF_PROG_TEST_RUN`; 96-byte packets, \
             restored before each run by a program that tail-calls the measured one. **The way there is in the figures: \
             subtract `floor`** (`floor-overlay` for cases out of the overlay, whose wrapper also sets a tunnel key; `floor-edge` at XDP; \
             `floor-one-a-run` for what no wrapper at tc can make short again, where each packet is a run of its own). \
             Connections were opened by the programs themselves, each case has tables of its own; *full*: 700,000 other \
             connections went through first. Checked in every round by the counters: established packets cause no \
             decision, new ones one each, refused ones a drop each. Packets that make an event each come \
             in bursts of 1,000, after which the events are read: a reader that keeps up. Checksums are full, not offloaded; the redirect \
             itself and the device are not in it. Services: 10,000 others with 10 backends each stand beside, and a peer's 64 \
             backends behind the one that is asked. *524,288 flows*: so many connections to 32 ports of one service are there at once, \
             in tables with room for all; a round meets 32,768 of them, the next round the next.\n",
            self.rounds
        );
        for family in [4, 6] {
            let _ = write!(
                text,
                "\n### IPv{family}\n\n| case | program | tables | 1 flow | 1,024 flows | 16,384 flows | 524,288 flows | each packet a new flow |\n|---|---|---|---|---|---|---|---|\n"
            );
            let names = ["floor", "floor-overlay", "floor-edge", "floor-one-a-run"]
                .into_iter()
                .chain(cases::ALL.iter().map(|case| case.name));
            for name in names {
                for tables in ["fresh", "full"] {
                    packet_row(&measures.lines, text, name, family, tables);
                }
            }
        }
        text.push_str("\nThe cases:\n\n");
        for case in cases::ALL {
            let _ = writeln!(text, "- `{}`: {}", case.name, case.about);
        }
        text.push_str(
            "\n### What came out\n\nOne packet of every case with a service, taken apart again: addresses, ports, every checksum, \
             outer headers, options, at the edge Ethernet addresses.\n\n| case | program | packet |\n|---|---|---|\n",
        );
        for it in &measures.checked {
            let _ = writeln!(text, "| {} | `{}` | {} |", it.case, it.program, it.packet);
        }
    }

    fn traffic_table(&self, text: &mut String) {
        text.push_str(
            "\n## Real traffic, pod to pod, IPv4\n\nClient and server on one processor, a thread each; all ways take turns in every round. \
             *connections*: connect, one byte each way, close by RST. *requests*: one byte each way on one connection. \
             *bulk*: one stream, the receiver on the other processor. `near` is on the same node, `far` on another; `plain` is kernel \
             routing over the same devices, with `plain-vxlan-far` through a VXLAN device. Each lab pod is under a policy \
             that lets the client in by one rule, or by the last of 1,000. *unreported*: the packet path reports drops only. \
             *rate*: median over the rounds of the ratio to the way beside it; *cpu*: least processor time of both threads \
             an operation, and its ratio.\n\n",
        );
        traffic::write_rows(&self.traffic, text);
    }

    fn control_table(&self, text: &mut String) {
        let Some(Control { apply_nothing_ms, policies, attach }) = &self.control else { return };
        let _ = write!(
            text,
            "\n## Policies, endpoints, memory\n\nWall time of `cirri lab apply --wait` on one node with ten kinds of pods; {apply_nothing_ms:.0} ms of \
             it are there when nothing has changed.\n\n\
             | policies | new at once, ms | nothing new, ms | one more: min / p25 / median, ms | agent, MiB |\n|---|---|---|---|---|\n"
        );
        for at in policies {
            let Spread { min, p25, median } = at.one_more_ms;
            let _ = writeln!(
                text,
                "| {} | {} new: {:.0} | {:.0} | {min:.0} / {p25:.0} / {median:.0} | {:.1} |",
                at.policies, at.new, at.all_ms, at.nothing_ms, at.agent_mib
            );
        }
        let _ = writeln!(
            text,
            "\n{} pods attached by CNI ADD, as many at a time as `apply` does: ready after {:.1} ms (p50), {:.1} ms (p99) as the \
             agent reports; {:.0} ms wall a pod with everything around it. The agent's resident memory went from {:.1} to {:.1} MiB.",
            attach.pods,
            attach.ready_ms_p50,
            attach.ready_ms_p99,
            attach.wall_ms_a_pod,
            attach.agent_mib_before,
            attach.agent_mib
        );
    }

    fn program_table(&self, text: &mut String) {
        text.push_str("\n## Programs\n\nInstructions that the verifier walked; bytes of stack, of instructions, of machine code.\n\n| program | verified | stack | xlated | jited |\n|---|---|---|---|---|\n");
        for bill in &self.programs {
            let [verified, stack, xlated, jited] = bill.figures();
            let _ = writeln!(text, "| `{}` | {verified} | {stack} | {xlated} | {jited} |", bill.name());
        }
    }
}

fn packet_row(all: &[Line], text: &mut String, name: &str, family: u8, tables: &str) {
    let of = |it: &&Line| it.case == name && it.family == family;
    let lines: Vec<&Line> = all.iter().filter(of).filter(|it| it.tables == tables).collect();
    let Some(first) = lines.first() else { return };
    let gross = |line: Option<&&Line>| line.map_or("-".to_owned(), |it| shown(&it.gross));
    let cell = |flows: u64| gross(lines.iter().find(|it| it.flows == flows));
    // Their tables are larger, and as full as they get.
    let many = if tables == "full" {
        gross(all.iter().filter(of).find(|it| it.tables == "many").as_ref())
    } else {
        "-".into()
    };
    let cells = [cell(1), cell(1024), cell(16_384), many, cell(0)].join(" | ");
    let _ = writeln!(text, "| {name} | `{}` | {tables} | {cells} |", first.program);
}

fn load_average() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or_default()
}

fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ").map(|(_, name)| name));
    model.unwrap_or("unknown processor").to_owned()
}

/// Today in UTC, `2026-11-22`.
fn date() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let text = cirri_flow::rfc3339(now.as_nanos().try_into().unwrap_or(u64::MAX));
    text.split('T').next().unwrap_or_default().to_owned()
}
