//! Who a workload is: its labels, filtered, as one sorted set.
//!
//! A label is `source:key=value`. Pods of one set share one identity, so labels that only name an
//! instance (a hash, an index) are left out. A policy may select by such a label all the same: then
//! the filter keeps that key ([`LabelFilter::keep`], asked for by
//! [`crate::policy::Cluster::label_filter`]), because a policy that silently selects nothing would
//! leave pods open. Only the pods that carry the key get identities of their own.

use crate::resource::{NAMESPACE_NAME_LABEL, Namespace, Pod, Protocol};
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// Label with the pod's namespace.
pub const NAMESPACE: &str = "k8s:io.kubernetes.pod.namespace";
/// Prefix of the namespace's own labels.
pub const NAMESPACE_LABELS: &str = "k8s:io.cilium.k8s.namespace.labels.";
/// Label with the cluster's name.
pub const CLUSTER: &str = "k8s:io.cilium.k8s.policy.cluster";
/// Label with the pod's service account.
pub const SERVICE_ACCOUNT: &str = "k8s:io.cilium.k8s.policy.serviceaccount";
/// Label with the pod's named ports: `http/TCP/8080,metrics/UDP/9100`, sorted.
pub const NAMED_PORTS: &str = "cirri:named-ports";

/// The labels that make an identity.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IdentityLabels(BTreeMap<String, String>);

impl IdentityLabels {
    /// Who `pod` is. Without its namespace's object, only the namespace's name is known of it.
    pub fn of_pod(pod: &Pod, namespace: Option<&Namespace>, cluster: &str, filter: &LabelFilter) -> IdentityLabels {
        let mut labels = BTreeMap::new();
        for (key, value) in &pod.metadata.labels {
            if filter.admits(key) {
                labels.insert(format!("k8s:{key}"), value.clone());
            }
        }
        labels.insert(NAMESPACE.into(), pod.namespace().into());
        labels.insert(CLUSTER.into(), cluster.into());
        labels.insert(SERVICE_ACCOUNT.into(), pod.spec.service_account_name.clone());
        labels.insert(format!("{NAMESPACE_LABELS}{NAMESPACE_NAME_LABEL}"), pod.namespace().into());
        for (key, value) in namespace.iter().flat_map(|ns| &ns.metadata.labels) {
            labels.insert(format!("{NAMESPACE_LABELS}{key}"), value.clone());
        }
        let ports = named_ports(pod);
        if !ports.is_empty() {
            labels.insert(NAMED_PORTS.into(), ports);
        }
        IdentityLabels(labels)
    }

    /// The one label of a reserved identity, such as `reserved:host`.
    pub fn reserved(name: &str) -> IdentityLabels {
        IdentityLabels(BTreeMap::from([(format!("reserved:{name}"), String::new())]))
    }

    /// One line that says the whole set: `source:key=value` joined by `;`, sorted. Neither keys nor
    /// values can hold a `;`.
    pub fn canonical(&self) -> String {
        let one = |(key, value): (&String, &String)| match key.starts_with("reserved:") {
            true => key.clone(),
            false => format!("{key}={value}"),
        };
        self.0.iter().map(one).collect::<Vec<_>>().join(";")
    }

    /// Reads what [`IdentityLabels::canonical`] wrote.
    pub fn parse(text: &str) -> Result<IdentityLabels, LabelError> {
        let mut labels = BTreeMap::new();
        for item in text.split(';').filter(|item| !item.is_empty()) {
            let (key, value) = item.split_once('=').unwrap_or((item, ""));
            if !key.split_once(':').is_some_and(|(source, name)| !source.is_empty() && !name.is_empty()) {
                return Err(LabelError::NoSource { label: item.to_string() });
            }
            if labels.insert(key.to_string(), value.to_string()).is_some() {
                return Err(LabelError::Twice { key: key.to_string() });
            }
        }
        Ok(IdentityLabels(labels))
    }

    /// The value of a label by its full key, source included.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    /// Every label, sorted by key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// The namespace, if this is a pod.
    pub fn namespace(&self) -> Option<&str> {
        self.get(NAMESPACE)
    }

    /// The number of a named port, if these pods have one of that name and protocol.
    pub fn named_port(&self, name: &str, protocol: Protocol) -> Option<u16> {
        // They are sorted, and may be thousands.
        let mut rest = self.get(NAMED_PORTS)?;
        let wanted = (name, protocol.name());
        while !rest.is_empty() {
            crate::work::step();
            let middle =
                rest.as_bytes()[..rest.len() / 2].iter().rposition(|byte| *byte == b',').map_or(0, |at| at + 1);
            let (before, after) = rest.split_at(middle);
            let (port, after) = after.split_once(',').unwrap_or((after, ""));
            let (found, number) = split_port(port)?;
            match found.cmp(&wanted) {
                Ordering::Equal => return number.parse().ok(),
                Ordering::Less => rest = after,
                Ordering::Greater => rest = before.strip_suffix(',').unwrap_or(before),
            }
        }
        None
    }

    /// Every named port with its protocol and number.
    pub fn named_ports(&self) -> impl Iterator<Item = ((&str, Protocol), u16)> {
        self.get(NAMED_PORTS).into_iter().flat_map(|ports| ports.split(',')).filter_map(|port| {
            crate::work::step();
            let ((name, protocol), number) = split_port(port)?;
            Some(((name, Protocol::from_name(protocol)?), number.parse().ok()?))
        })
    }
}

/// `http/TCP/8080`, in parts.
fn split_port(port: &str) -> Option<((&str, &str), &str)> {
    let (name, rest) = port.split_once('/')?;
    let (protocol, number) = rest.split_once('/')?;
    Some(((name, protocol), number))
}

impl fmt::Display for IdentityLabels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.canonical())
    }
}

/// Why a line is no set of labels.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    /// No source before the key.
    #[error("label \"{label}\" has no source; write it as source:key=value, such as k8s:app=web")]
    NoSource {
        /// The label.
        label: String,
    },
    /// The key stands twice.
    #[error("label {key} stands twice; keep one of them")]
    Twice {
        /// The key.
        key: String,
    },
}

/// Which labels of a pod take part in its identity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelFilter {
    exclude: Vec<String>,
    keep: BTreeSet<String>,
}

impl Default for LabelFilter {
    /// Leaves out what only names an instance or a place.
    fn default() -> LabelFilter {
        LabelFilter { exclude: EXCLUDED.iter().map(|key| key.to_string()).collect(), keep: BTreeSet::new() }
    }
}

impl LabelFilter {
    /// A filter that leaves out these keys. One that ends in `/` or `.` leaves out all that begin so.
    pub fn excluding(keys: impl IntoIterator<Item = String>) -> LabelFilter {
        LabelFilter { exclude: keys.into_iter().collect(), keep: BTreeSet::new() }
    }

    /// Keeps a key that would be left out. Reserved keys stay out.
    pub fn keep(&mut self, key: &str) {
        self.keep.insert(key.to_string());
    }

    /// Whether a pod label of this key takes part.
    pub fn admits(&self, key: &str) -> bool {
        if is_reserved(key) {
            return false;
        }
        let excluded = self.exclude.iter().any(|rule| match rule.ends_with(['/', '.']) {
            true => key.starts_with(rule.as_str()),
            false => key == rule,
        });
        !excluded || self.keep.contains(key)
    }
}

/// Whether the key is one that identities use for what they know of a pod themselves. A pod that
/// carries it as a label of its own could pose as one of another namespace, so it never counts.
pub fn is_reserved(key: &str) -> bool {
    key == "io.kubernetes.pod.namespace" || key.starts_with("io.cilium.k8s.")
}

const EXCLUDED: &[&str] = &[
    "annotation.",
    "apps.kubernetes.io/pod-index",
    "batch.kubernetes.io/controller-uid",
    "batch.kubernetes.io/job-completion-index",
    "controller-revision-hash",
    "controller-uid",
    "etcd_node",
    "io.kubernetes.",
    "kubernetes.io/",
    "pod-template-generation",
    "pod-template-hash",
    "statefulset.kubernetes.io/pod-name",
    "topology.kubernetes.io/",
];

/// Named ports in order of name and protocol. Of two with the same, the first container's counts,
/// as Kubernetes resolves them.
fn named_ports(pod: &Pod) -> String {
    let mut ports = BTreeMap::new();
    for port in pod.spec.running().flat_map(|c| &c.ports) {
        if let Some(name) = &port.name {
            ports.entry((name.as_str(), port.protocol.name())).or_insert(port.container_port);
        }
    }
    ports.iter().map(|((name, protocol), number)| format!("{name}/{protocol}/{number}")).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::{Resource, parse_documents};

    fn pod(text: &str) -> Pod {
        match parse_documents("test.yaml", text).unwrap().remove(0) {
            Resource::Pod(pod) => pod,
            other => panic!("expected a pod, got {other:?}"),
        }
    }

    const POD: &str = "
apiVersion: v1
kind: Pod
metadata:
  name: web-0
  namespace: shop
  labels: {app: web, pod-template-hash: abc, io.kubernetes.pod.namespace: kube-system, io.cilium.k8s.namespace.labels.team: forged, topology.kubernetes.io/zone: a}
spec:
  containers:
  - name: a
    ports: [{name: metrics, containerPort: 9100, protocol: UDP}, {name: http, containerPort: 8080}, {containerPort: 1}]
  - name: b
    ports: [{name: http, containerPort: 8081}]
  initContainers:
  - name: proxy
    restartPolicy: Always
    ports: [{name: admin, containerPort: 15000}, {name: http, containerPort: 15001}]
  - name: migrate
    ports: [{name: over, containerPort: 1}]
";

    #[test]
    fn a_pod_is_its_filtered_labels_its_namespace_and_its_named_ports() {
        let namespace = match parse_documents(
            "test.yaml",
            "{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {team: retail}}}",
        )
        .unwrap()
        .remove(0)
        {
            Resource::Namespace(namespace) => namespace,
            other => panic!("expected a namespace, got {other:?}"),
        };
        let labels = IdentityLabels::of_pod(&pod(POD), Some(&namespace), "default", &LabelFilter::default());
        assert_eq!(
            labels.canonical(),
            "cirri:named-ports=admin/TCP/15000,http/TCP/8080,metrics/UDP/9100;\
             k8s:app=web;\
             k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name=shop;\
             k8s:io.cilium.k8s.namespace.labels.team=retail;\
             k8s:io.cilium.k8s.policy.cluster=default;\
             k8s:io.cilium.k8s.policy.serviceaccount=default;\
             k8s:io.kubernetes.pod.namespace=shop"
        );
        assert_eq!(IdentityLabels::parse(&labels.canonical()).unwrap(), labels);
        assert_eq!(labels.named_port("http", Protocol::Tcp), Some(8080));
        assert_eq!(labels.named_port("metrics", Protocol::Udp), Some(9100));
        assert_eq!(labels.named_port("metrics", Protocol::Tcp), None);
    }

    #[test]
    fn the_filter_keeps_a_key_on_demand_but_never_a_reserved_one() {
        let mut filter = LabelFilter::default();
        filter.keep("pod-template-hash");
        filter.keep("io.kubernetes.pod.namespace");
        let labels = IdentityLabels::of_pod(&pod(POD), None, "default", &filter);
        assert_eq!(labels.get("k8s:pod-template-hash"), Some("abc"));
        assert_eq!(labels.namespace(), Some("shop"));
        assert_eq!(labels.get("k8s:io.cilium.k8s.namespace.labels.team"), None);
    }

    #[test]
    fn a_line_without_source_or_with_a_key_twice_is_refused() {
        assert!(matches!(IdentityLabels::parse("app=web"), Err(LabelError::NoSource { .. })));
        assert!(matches!(IdentityLabels::parse("k8s:a=1;k8s:a=2"), Err(LabelError::Twice { .. })));
        assert_eq!(IdentityLabels::parse("reserved:host").unwrap(), IdentityLabels::reserved("host"));
    }
}
