//! What a case's author says must come out, in a few lines that are derived by hand.
//!
//! Everything passes that no line speaks of; where two lines speak of the same cell, the later one
//! holds. A line is `FROM -> TO PROBES VERDICT [FAMILY]`:
//!
//! - FROM and TO: names with commas between; a name is a pod `x/a`, all pods of a namespace `x/*`, all
//!   of a name `*/a`, `pods`, `world`, a node `node1`, `nodes`, or `anyone`.
//! - PROBES: `tcp/80` and the like with commas between, `tcp`, `udp`, or `all`.
//! - VERDICT: `passes` or `dropped`. FAMILY: `ipv4` or `ipv6`; both if absent.
//!
//! What no policy can forbid (a pod and itself, a pod and its own node) passes whatever is said.

use super::matrix::{Family, Matrix, Probe, is_pod};
use super::{CaseError, OUTSIDE, participants};
use crate::reference::World;

struct Statement<'a> {
    from: &'a str,
    to: &'a str,
    probes: &'a str,
    passes: bool,
    family: Option<Family>,
}

/// Carries out the statements of `text` for the pods and nodes of `world`.
pub(super) fn matrix(text: &str, world: &World) -> Result<Matrix, CaseError> {
    let participants = participants(world);
    let mut statements = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let statement = Statement::parse(line).and_then(|statement| statement.check(&participants).map(|()| statement));
        statements.push(statement.map_err(|problem| CaseError::Text { file: "says.txt", line: index + 1, problem })?);
    }
    Ok(Matrix::fill(&participants, |cell| {
        let never_forbidden = cell.from == cell.to
            || world.pods.iter().any(|pod| {
                let name = pod.full_name();
                (name == cell.from && pod.node == cell.to) || (name == cell.to && pod.node == cell.from)
            });
        let last = statements.iter().rev().find(|statement| {
            list_has(statement.from, &cell.from)
                && list_has(statement.to, &cell.to)
                && probes_have(statement.probes, cell.probe)
                && statement.family.is_none_or(|family| family == cell.family)
        });
        Some(never_forbidden || last.is_none_or(|statement| statement.passes))
    }))
}

impl<'a> Statement<'a> {
    fn parse(line: &'a str) -> Result<Statement<'a>, String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (from, to, probes, verdict, family) = match words.as_slice() {
            [from, "->", to, probes, verdict] => (from, to, probes, verdict, None),
            [from, "->", to, probes, verdict, family] => {
                let family = Family::parse(family).ok_or_else(|| format!("no family {family:?}"))?;
                (from, to, probes, verdict, Some(family))
            }
            _ => return Err("not of the form FROM -> TO PROBES VERDICT [FAMILY]".to_string()),
        };
        let passes = match *verdict {
            "passes" => true,
            "dropped" => false,
            other => return Err(format!("{other:?} is neither passes nor dropped")),
        };
        Ok(Statement { from, to, probes, passes, family })
    }

    /// A pattern that matches nobody is a typing error.
    fn check(&self, participants: &[String]) -> Result<(), String> {
        for pattern in self.from.split(',').chain(self.to.split(',')) {
            if !participants.iter().any(|name| matches(pattern, name)) {
                return Err(format!("{pattern:?} names nobody"));
            }
        }
        for probe in self.probes.split(',') {
            if !matches!(probe, "all" | "tcp" | "udp") && Probe::parse(probe).is_none() {
                return Err(format!("{probe:?} is no probe"));
            }
        }
        Ok(())
    }
}

fn list_has(patterns: &str, name: &str) -> bool {
    patterns.split(',').any(|pattern| matches(pattern, name))
}

fn matches(pattern: &str, name: &str) -> bool {
    match pattern {
        "anyone" => true,
        "pods" => is_pod(name),
        "nodes" => !is_pod(name) && name != OUTSIDE,
        _ => match (pattern.split_once('/'), name.split_once('/')) {
            (Some(("*", wanted)), Some((_, pod))) => wanted == pod,
            (Some((wanted, "*")), Some((namespace, _))) => wanted == namespace,
            _ => pattern == name,
        },
    }
}

fn probes_have(probes: &str, probe: Probe) -> bool {
    probes.split(',').any(|wanted| {
        wanted == "all" || wanted == probe.protocol.to_string() || Probe::parse(wanted).is_some_and(|p| p == probe)
    })
}
