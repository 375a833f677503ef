//! What can go wrong, and what to do about it.

use std::{io, path::PathBuf};

use crate::features::OLDEST_KERNEL;

/// Loading, pinning or attaching failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// A kernel feature or a privilege that Cirri cannot do without is not there.
    #[error("{what}; {hint}")]
    Missing {
        /// What is missing.
        what: String,
        /// What to do.
        hint: &'static str,
    },
    /// The kernel lacks what Cirri is made of.
    #[error("Linux {release} lacks {}; Cirri needs Linux {}.{} or later", .lacks.join(", "), OLDEST_KERNEL.0, OLDEST_KERNEL.1)]
    Kernel {
        /// What it calls itself.
        release: String,
        /// Each thing, with a version that has it.
        lacks: Vec<String>,
    },
    /// The embedded object cannot be used by this build.
    #[error("the embedded packet programs do not belong to this build: {0}; run `cargo xtask build` and build again")]
    Object(String),
    /// The configuration asks for something that cannot be.
    #[error("bpf.maps: {0}")]
    Sizes(String),
    /// The kernel refused the object before it came to a program.
    #[error("loading the packet programs: {error}{}", warned(.warnings))]
    Load {
        /// What aya says.
        error: Box<aya::EbpfError>,
        /// What aya warned about meanwhile; trouble with BTF shows only here.
        warnings: Vec<String>,
    },
    /// The verifier rejected a program.
    #[error("the verifier rejected {program}: {telling}{}", warned(.warnings))]
    Verifier {
        /// The program.
        program: String,
        /// The lines of the log that say why.
        telling: String,
        /// The whole log.
        log: VerifierLog,
        /// What aya warned about meanwhile.
        warnings: Vec<String>,
    },
    /// A program could not be loaded, for another reason.
    #[error("loading {program}: {error}")]
    Program {
        /// The program.
        program: String,
        /// What aya says.
        error: Box<aya::programs::ProgramError>,
    },
    /// A device does not exist in this network namespace.
    #[error("device {device} is not in this network namespace")]
    NoDevice {
        /// Its name.
        device: String,
    },
    /// A program could not be attached.
    #[error("attaching {program} to {device}: {error}")]
    Attach {
        /// The program.
        program: &'static str,
        /// The device, or the cgroup's directory.
        device: String,
        /// What aya or the kernel says.
        error: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Filters of a device, which programs are on without tcx, cannot be listed or taken off.
    #[error("filters of {device}: {error}")]
    Filters {
        /// Its name, or its number.
        device: String,
        /// What the kernel says.
        error: io::Error,
    },
    /// A directory is not, or is no longer, a cgroup that programs can be put on.
    #[error(
        "cgroup {path}: {problem}; set services.socket.cgroup to a directory of a cgroup2 mount, such as the mount \
         itself for all processes"
    )]
    Cgroup {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Somebody uses the instance.
    #[error("{path} is in use: stop the agent or load balancer of this instance first, or take another bpf.instance")]
    Busy {
        /// The directory of its pins.
        path: PathBuf,
    },
    /// Another agent uses the same instance name in another network namespace.
    #[error(
        "{path} holds a link of another network namespace's device {ifindex}: two agents share one instance name; \
         give each its own bpf.instance"
    )]
    ForeignLink {
        /// The pinned link.
        path: PathBuf,
        /// The device's number.
        ifindex: u32,
    },
    /// A file operation on the pin directory failed.
    #[error("{path}: {action}: {error}")]
    Pin {
        /// The path.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        error: io::Error,
    },
    /// A map could not be used.
    #[error(transparent)]
    Map(#[from] MapError),
}

/// An operation on a map failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// The kernel refused.
    #[error("map {map}: {action}: {error}")]
    Kernel {
        /// The map.
        map: String,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        error: io::Error,
    },
    /// The map is full.
    #[error("map {map} is full ({max_entries} entries); raise its size under bpf.maps and restart the agent")]
    Full {
        /// The map.
        map: String,
        /// Its size.
        max_entries: u32,
    },
    /// The map is not what this build expects; using it would be unsafe.
    #[error("map {map} has {actual}, this build needs {expected}")]
    Incompatible {
        /// The map.
        map: String,
        /// What the kernel says.
        actual: String,
        /// What the ABI says.
        expected: String,
    },
    /// There is no such map.
    #[error("there is no map {name}; the maps are {known}")]
    Unknown {
        /// The name asked for.
        name: String,
        /// The names there are.
        known: String,
    },
    /// A rule set slot outside 1 to 4095.
    #[error("{slot} is no slot of a rule set")]
    Slot {
        /// The slot.
        slot: u16,
    },
    /// A rule set read back differs from what was written, so it was not made live.
    #[error("rule set {slot}: {written} of {wanted} entries arrived in the new table; the old one stays in force")]
    Incomplete {
        /// The slot.
        slot: u16,
        /// Entries that arrived.
        written: usize,
        /// Entries that should have.
        wanted: usize,
    },
    /// The map holds no entries that could be listed.
    #[error("map {map} holds {holds}, not entries that could be listed")]
    NoEntries {
        /// The map.
        map: String,
        /// What it holds.
        holds: &'static str,
    },
}

fn warned(warnings: &[String]) -> String {
    if warnings.is_empty() { String::new() } else { format!(" (warned before: {})", warnings.join("; ")) }
}

/// Everything that the verifier wrote. Thousands of lines, so an error shows them only on request.
#[derive(Clone)]
pub struct VerifierLog(pub(crate) String);

impl VerifierLog {
    /// The text.
    pub fn text(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for VerifierLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} lines", self.0.lines().count())
    }
}

/// The lines of a verifier log that say why: the source line it was at and the last ones before its
/// statistics.
pub(crate) fn telling_lines(log: &str) -> String {
    const KEPT: usize = 2;
    let statistics = ["processed ", "verification time", "stack depth", "mark_precise"];
    let lines: Vec<&str> = log
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !statistics.iter().any(|start| line.starts_with(start)))
        .collect();
    if lines.is_empty() {
        return "it gave no reason".into();
    }
    let (before, last) = lines.split_at(lines.len().saturating_sub(KEPT));
    let source = before.iter().rev().find(|line| line.starts_with(';') && line.contains('@'));
    source.into_iter().chain(last).copied().collect::<Vec<_>>().join(" | ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_verifier_log_the_reason_is_told_and_not_the_statistics() {
        let log = "0: R1=ctx() R10=fp0\n; let next = at + length; @ parse.rs:40\n1: (71) r2 = *(u8 *)(r1 +4)\n2: (0f) r3 += r2\nR3 pointer arithmetic on pkt_end prohibited\n\
                   verification time 65 usec\nstack depth 0\nprocessed 3 insns (limit 1000000) max_states_per_insn 0\n";
        let told = telling_lines(log);
        assert!(told.starts_with("; let next = at + length; @ parse.rs:40 | "), "{told}");
        assert!(told.ends_with("| R3 pointer arithmetic on pkt_end prohibited"), "{told}");
        assert!(!told.contains("processed") && !told.contains("R10=fp0"), "{told}");
    }

    #[test]
    fn an_empty_log_says_so() {
        assert_eq!(telling_lines("processed 0 insns\n"), "it gave no reason");
    }
}
