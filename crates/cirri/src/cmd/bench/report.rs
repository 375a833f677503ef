//! `cirri bench all`: everything, as JSON and as Markdown.

use std::fmt::Write as _;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use serde::Serialize;

use super::control::{self, Control};
use super::packets::{self, Line, Measures, shown};
use super::stats::Spread;
use super::traffic::{self, Line as Traffic, mode_name};
use super::verify::{self, Bill};
use super::{cases, load::Mode};

/// What is measured, and how much.
#[derive(Clone, Debug)]
pub struct Plan {
    pub packets: packets::Plan,
    pub traffic: traffic::Plan,
    pub control: control::Plan,
    pub quick: bool,
}

/// Everything that was measured in one go.
#[derive(Debug, Serialize)]
struct Report {
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
    measures: Measures,
    traffic: Vec<Traffic>,
    control: Option<Control>,
}

/// Measures everything and writes `latest.json` and `README.md` into a directory, anew after each
/// part: what fails late does not lose what was measured before.
pub fn run(pin_root: &Path, plan: &Plan, out: &Path) -> Result<()> {
    std::fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    let before = load_average();
    let mut report = Report {
        programs: verify::run(pin_root)?,
        measures: packets::run(pin_root, &plan.packets)?,
        traffic: Vec::new(),
        control: None,
        date: date(),
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        machine: processor(),
        processors: std::thread::available_parallelism().map_or(1, usize::from),
        build: if cfg!(debug_assertions) { "debug" } else { "release" },
        quick: plan.quick,
        load: [before, load_average()],
        rounds: plan.packets.rounds,
    };
    report.write(out)?;
    report.traffic = traffic::run(pin_root, &plan.traffic)?;
    report.load = [before, load_average()];
    report.write(out)?;
    report.control = Some(control::run(&plan.control)?);
    report.load = [before, load_average()];
    report.write(out)
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
        self.goals(&mut text);
        self.packet_tables(&mut text);
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

    // === Goals ===

    fn goals(&self, text: &mut String) {
        text.push_str(
            "\n## Where it stands\n\nThe peer's figures (Cilium 1.19-dev, `bpf_lxc`, compiled as an agent sets it) were measured on \
             the same kind of machine in another run; ratios to them carry that caveat.\n\n\
             | goal | | mark | here | what bounds it |\n|---|---|---|---|---|\n",
        );
        let mut row = |cells: [&str; 5]| text.push_str(&format!("| {} |\n", cells.join(" | ")));
        row([
            "5",
            "pod egress to another node, policy on, established, ns over `bpf_lxc` (466 / 482; VXLAN 496 / 504)",
            "≤ 0.35",
            &self.over_peer(&[("pod-to-remote-direct", 466.0, 482.0), ("pod-to-remote-overlay", 496.0, 504.0)]),
            "the flow lookup and the helper that redirects; into the tunnel, setting its key (about 35 ns)",
        ]);
        row([
            "6",
            "pod to pod on one node, policy of both sides, over `bpf_lxc` egress + ingress (840 / 851)",
            "≤ 0.25",
            &self.over_peer(&[("pod-to-pod", 840.0, 851.0)]),
            "one flow lookup for both sides; with 16K flows, one or two cold lines of the flow table",
        ]);
        row([
            "8",
            "connections/s with policy and 10,000 services over plain routing",
            "≥ 1.05",
            &format!(
                "no services yet; without: {}",
                self.rates(&["overlay-near", "direct-near", "direct-far"], Mode::Connections)
            ),
            "a connection is mostly the two TCP stacks; a new one costs two decisions' worth of slow path and an event",
        ]);
        row([
            "9",
            "connections/s at 1,000 over 1 policy rule",
            "≥ 0.98",
            &self.rates(&["overlay-near-1000-rules", "direct-far-1000-rules"], Mode::Connections),
            "a rule set is asked once a connection, by longest prefix: depth, not number of rules",
        ]);
        row([
            "12",
            "connections/s with reported connections over without",
            "≥ 0.98",
            &self.visibility(),
            "an established packet pays nothing; a new connection pays an event, and the agent that reads and names it \
             shares the processor with the traffic",
        ]);
        row([
            "17",
            "requests on one connection over plain routing",
            "≥ 1.08",
            &self.rates(&["overlay-near", "direct-near", "direct-far"], Mode::Requests),
            "the node's stack is left out on the way to a local pod; between nodes only on one side",
        ]);
    }

    fn over_peer(&self, cases: &[(&str, f64, f64)]) -> String {
        let one = |(case, min, p25): &(&str, f64, f64)| {
            let ours = self.measures.lines.iter().find(|it| it.case == *case && it.family == 4 && it.flows == 1)?;
            Some(format!("{case}: {:.2} (min), {:.2} (p25)", ours.gross.min / min, ours.gross.p25 / p25))
        };
        cases.iter().filter_map(one).collect::<Vec<_>>().join("; ")
    }

    fn rates(&self, ways: &[&str], mode: Mode) -> String {
        let lines = ways.iter().filter_map(|way| self.traffic.iter().find(|it| it.way == *way && it.mode == mode));
        let shown = |it: &Traffic| format!("{}: {:.2} (cpu {:.2})", it.way, it.rate_ratio, it.cpu_ratio);
        lines.map(shown).collect::<Vec<_>>().join("; ")
    }

    fn visibility(&self) -> String {
        let quiet = self.traffic.iter().filter(|it| it.way.ends_with("-unreported") && it.mode == Mode::Connections);
        let shown = |it: &Traffic| format!("{}: {:.2} (cpu {:.2})", it.beside, 1.0 / it.rate_ratio, 1.0 / it.cpu_ratio);
        quiet.map(shown).collect::<Vec<_>>().join("; ")
    }

    // === Tables ===

    fn packet_tables(&self, text: &mut String) {
        let _ = write!(
            text,
            "\n## Nanoseconds a packet\n\nmin / p25 / median of {} interleaved rounds, by `BPF_PROG_TEST_RUN`; 96-byte packets, \
             restored before each run by a program that tail-calls the measured one. **The way there is in the figures: \
             subtract `floor`** (`floor-overlay` for cases out of the overlay, whose wrapper also sets a tunnel key). \
             Connections were opened by the programs themselves, each case has tables of its own; *full*: 700,000 other \
             connections went through first. Checked in every round by the counters: established packets cause no \
             decision, new ones one each, refused ones a drop each. Packets that make an event each come \
             in bursts of 1,000, after which the events are read: a reader that keeps up. Checksums are full, not offloaded; the redirect \
             itself and the device are not in it.\n",
            self.rounds
        );
        for family in [4, 6] {
            let _ = write!(
                text,
                "\n### IPv{family}\n\n| case | program | tables | 1 flow | 1,024 flows | 16,384 flows | each packet a new flow |\n|---|---|---|---|---|---|---|\n"
            );
            let names = ["floor", "floor-overlay"].into_iter().chain(cases::ALL.iter().map(|case| case.name));
            for name in names {
                for tables in ["fresh", "full"] {
                    self.packet_row(text, name, family, tables);
                }
            }
        }
        text.push_str("\nThe cases:\n\n");
        for case in cases::ALL {
            let _ = writeln!(text, "- `{}`: {}", case.name, case.about);
        }
    }

    fn packet_row(&self, text: &mut String, name: &str, family: u8, tables: &str) {
        let lines: Vec<&Line> = self
            .measures
            .lines
            .iter()
            .filter(|it| it.case == name && it.family == family && it.tables == tables)
            .collect();
        let Some(first) = lines.first() else { return };
        let cell = |flows: u64| lines.iter().find(|it| it.flows == flows).map_or("-".to_owned(), |it| shown(&it.gross));
        let program = &first.program;
        let _ = writeln!(
            text,
            "| {name} | `{program}` | {tables} | {} | {} | {} | {} |",
            cell(1),
            cell(1024),
            cell(16_384),
            cell(0)
        );
    }

    fn traffic_table(&self, text: &mut String) {
        text.push_str(
            "\n## Real traffic, pod to pod, IPv4\n\nClient and server on one processor, a thread each; all ways take turns in every round. \
             *connections*: connect, one byte each way, close by RST. *requests*: one byte each way on one connection. \
             *bulk*: one stream, the receiver on the other processor. `near` is on the same node, `far` on another; `plain` is kernel \
             routing over the same devices, with `plain-vxlan-far` through a VXLAN device. Each lab pod is under a policy \
             that lets the client in by one rule, or by the last of 1,000. *unreported*: the packet path reports drops only. \
             *rate*: median over the rounds of the ratio to the way beside it; *cpu*: least processor time of both threads \
             an operation, and its ratio.\n\n\
             | way | mode | median | best | p50 µs | p99 µs | cpu | beside | rate | cpu |\n|---|---|---|---|---|---|---|---|---|---|\n",
        );
        for it in &self.traffic {
            let figures = traffic::shown(it);
            let _ = writeln!(
                text,
                "| {} | {} | {} | {} | {:.0} | {:.0} | {} | {} | {:.2} | {:.2} |",
                it.way,
                mode_name(it.mode),
                figures.median,
                figures.best,
                it.p50,
                it.p99,
                figures.cpu,
                it.beside,
                it.rate_ratio,
                it.cpu_ratio
            );
        }
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
