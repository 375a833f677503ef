//! What is done on each kernel, in this order. A step that fails does not keep the next from being tried.

/// One of them.
pub struct Step {
    /// One word, as it stands on the console.
    pub name: &'static str,
    /// For people.
    pub about: &'static str,
    /// A line of the guest's shell; its exit code is the outcome.
    pub line: &'static str,
    /// Seconds of the guest's clock after which it has failed.
    pub limit: u32,
    /// The test binaries that it wants, by the names of their files in `e2e/tests`.
    pub tests: &'static [&'static str],
    /// What it says it did (`@part NAME SECONDS` on a line of its own), one after the other; a row each.
    pub parts: &'static [Part],
    /// Whether it is among those that every `cargo xtask test` does.
    pub loads: bool,
}

/// Something that a step does among other things.
pub struct Part {
    /// One word.
    pub name: &'static str,
    /// For people.
    pub about: &'static str,
}

/// The step whose output is the verifier's bill.
pub const LOAD: &str = "load";

/// All of them.
pub const STEPS: &[Step] = &[
    Step {
        name: "boot",
        about: "boots, with the modules that a node needs",
        line: "true",
        limit: 10,
        tests: &[],
        parts: &[],
        loads: true,
    },
    Step {
        name: LOAD,
        about: "loads every program",
        line: "/bin/cirri bench verify -o json",
        limit: 600,
        tests: &[],
        parts: &[],
        loads: true,
    },
    Step {
        name: "tables",
        about: "tables, rule sets, events",
        line: "/bin/kernel_tables --test-threads=1",
        limit: 1800,
        tests: &["kernel_tables"],
        parts: &[],
        loads: false,
    },
    Step {
        name: "fixtures",
        about: "the fixtures' verdicts",
        line: "/bin/kernel_fixtures --test-threads=1",
        limit: 1800,
        tests: &["kernel_fixtures"],
        parts: &[],
        loads: false,
    },
    Step {
        name: "node",
        about: "a lab of two nodes",
        line: "/bin/lab_kernel --test-threads=1 --exact a_node_works",
        limit: 1800,
        tests: &["lab_kernel"],
        parts: &[
            Part { name: "pod", about: "pods are attached and reach each other" },
            Part { name: "policy", about: "a policy is in force" },
            Part { name: "service", about: "a service answers, by socket and by packet" },
        ],
        loads: false,
    },
    Step {
        name: "lb",
        about: "`cirri lb` balances, in tc and in XDP",
        line: "/bin/lab_kernel --test-threads=1 --exact a_load_balancer_balances",
        limit: 900,
        tests: &["lab_kernel"],
        parts: &[],
        loads: false,
    },
];

/// What is done on a kernel older than the oldest that Cirri is for: it is refused before anything is changed, in words
/// that say what it lacks and which kernel will do.
pub const REFUSAL: &[Step] = &[
    Step { name: "boot", about: "boots, with the modules that a node needs", line: "true", limit: 10, ..REFUSED },
    Step {
        name: "refused",
        about: "is refused by name, and with what will do",
        line: "said=$(/bin/cirri bench verify 2>&1) && exit 1; echo \"$said\"; echo \"$said\" | grep -q \"lacks .* (Linux .*; Cirri needs Linux 6.1 or later\"",
        ..REFUSED
    },
];

const REFUSED: Step = Step { name: "", about: "", line: "", limit: 300, tests: &[], parts: &[], loads: true };

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_step_has_a_name_of_its_own_of_one_word() {
        let parts = STEPS.iter().flat_map(|step| step.parts).map(|part| part.name);
        let names: Vec<&str> = STEPS.iter().map(|step| step.name).chain(parts).collect();
        for (i, name) in names.iter().enumerate() {
            assert!(names.iter().skip(i + 1).all(|other| other != name), "{name}");
            assert!(name.chars().all(|c| c.is_ascii_lowercase()), "{name}");
        }
        assert!(STEPS.iter().any(|step| step.name == LOAD && step.loads));
    }
}
