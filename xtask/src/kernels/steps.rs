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
    /// Whether it is among those that every `cargo xtask test` does.
    pub loads: bool,
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
        loads: true,
    },
    Step {
        name: LOAD,
        about: "loads every program",
        line: "/bin/cirri bench verify -o json",
        limit: 600,
        tests: &[],
        loads: true,
    },
    Step {
        name: "tables",
        about: "tables, rule sets, events",
        line: "/bin/kernel_tables --test-threads=1",
        limit: 1800,
        tests: &["kernel_tables"],
        loads: false,
    },
    Step {
        name: "fixtures",
        about: "the fixtures' verdicts",
        line: "/bin/kernel_fixtures --test-threads=1",
        limit: 1800,
        tests: &["kernel_fixtures"],
        loads: false,
    },
    Step {
        name: "pod",
        about: "pods are attached and reach each other",
        line: "/bin/lab_kernel --test-threads=1 --exact pods_reach_each_other",
        limit: 900,
        tests: &["lab_kernel"],
        loads: false,
    },
    Step {
        name: "policy",
        about: "a policy is in force",
        line: "/bin/lab_kernel --test-threads=1 --exact a_policy_is_in_force",
        limit: 900,
        tests: &["lab_kernel"],
        loads: false,
    },
    Step {
        name: "service",
        about: "a service answers, by socket and by packet",
        line: "/bin/lab_kernel --test-threads=1 --exact a_service_answers",
        limit: 900,
        tests: &["lab_kernel"],
        loads: false,
    },
    Step {
        name: "lb",
        about: "`cirri lb` balances, in tc and in XDP",
        line: "/bin/lab_kernel --test-threads=1 --exact a_load_balancer_balances",
        limit: 900,
        tests: &["lab_kernel"],
        loads: false,
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_step_has_a_name_of_its_own_of_one_word() {
        for (i, step) in STEPS.iter().enumerate() {
            assert!(STEPS.iter().skip(i + 1).all(|other| other.name != step.name), "{}", step.name);
            assert!(step.name.chars().all(|c| c.is_ascii_lowercase()), "{}", step.name);
        }
        assert!(STEPS.iter().any(|step| step.name == LOAD && step.loads));
    }
}
