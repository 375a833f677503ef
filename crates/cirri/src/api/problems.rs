//! What is not well on a node, one by one.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Something on this node that is not as it should be, and does not make itself right at once.
///
/// `cirri status --check` exits 1 as long as there is any.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// Of what kind.
    pub what: ProblemKind,
    /// Which one: the name of a device, route, policy, key, file and the like.
    pub object: String,
    /// Since when, RFC 3339.
    pub since: String,
    /// What is there.
    pub found: String,
    /// What should be there.
    pub wanted: String,
    /// What to do; empty if the agent does it by itself.
    pub remedy: String,
}

/// Kinds of [`Problem`]; lower case with `-` in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProblemKind {
    /// The store does not answer, or was not seen whole yet.
    Store,
    /// Something stored cannot be read.
    StoredObject,
    /// A manifest in the folder cannot be read.
    Manifest,
    /// A policy is not taken: what it selects is closed, and its last good version is in force, if there is one.
    Policy,
    /// A rule set is not just what its policies say, and never more open.
    RuleSet,
    /// Labels have no identity yet.
    Identity,
    /// A service is not as its resources want it.
    Service,
    /// A health check port is not answered.
    HealthCheck,
    /// Services are not translated in the system call.
    Sockets,
    /// Rows of a table are not in the kernel yet, or not in the store.
    Pending,
    /// The kernel or the store refuses a row of a table.
    Row,
    /// A device is missing or not as it should be.
    Device,
    /// An address of the node is gone.
    Address,
    /// A route or policy rule is missing, or another stands in its place.
    Route,
    /// A program is off its device or cgroup, or another stands in its place.
    Program,
    /// A pin is gone.
    Pin,
    /// A map holds something else than was written.
    Map,
    /// A setting of the kernel has another value.
    Setting,
    /// A workload is not as it was attached.
    Endpoint,
    /// What the node wrote in the store is gone, or somebody else changes it.
    Record,
    /// A file of the agent's own is gone, or another stands in its place.
    File,
}

impl fmt::Display for ProblemKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The same name as in JSON.
        self.serialize(f)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Problem { what, object, since, found, wanted, remedy } = self;
        write!(f, "{what} {object}: {found}")?;
        if !wanted.is_empty() {
            write!(f, "; wanted: {wanted}")?;
        }
        if !remedy.is_empty() {
            write!(f, "; {remedy}")?;
        }
        write!(f, " (since {since})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_has_the_same_name_in_json_and_in_the_table() {
        let all = [ProblemKind::StoredObject, ProblemKind::HealthCheck, ProblemKind::RuleSet, ProblemKind::Endpoint];
        for kind in all {
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.to_string());
        }
    }
}
