//! Which workloads a policy means.

use crate::labels::{self, IdentityLabels};
use crate::resource::{LabelSelector, Operator};
use std::collections::BTreeSet;
use std::fmt;

/// Selects pods by their identity's labels: all requirements must hold. It never selects anything
/// but pods: the world, nodes and other reserved identities have no namespace.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Selector {
    requirements: BTreeSet<Requirement>,
}

/// The namespaces that a selector looks into.
#[derive(Clone, Copy, Debug)]
pub enum Scope<'a> {
    /// This one.
    Named(&'a str),
    /// Those with these labels.
    Labelled(&'a LabelSelector),
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Requirement {
    about: About,
    /// Full key, source included.
    key: String,
    operator: Operator,
    values: BTreeSet<String>,
}

/// What a requirement asks for. The key alone does not tell: a policy may ask for a pod label
/// that is spelled like one of the identity's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum About {
    Pod,
    NamespaceLabel,
    NamespaceName,
}

impl Selector {
    /// Pods with these labels (`None`: any) in these namespaces.
    pub fn new(pods: Option<&LabelSelector>, scope: Scope<'_>) -> Selector {
        let mut requirements = BTreeSet::new();
        if let Some(pods) = pods {
            requirements.extend(parts(pods, About::Pod));
        }
        match scope {
            Scope::Named(namespace) => {
                requirements.insert(Requirement {
                    about: About::NamespaceName,
                    key: labels::NAMESPACE.into(),
                    operator: Operator::In,
                    values: BTreeSet::from([namespace.to_string()]),
                });
            }
            Scope::Labelled(selector) => requirements.extend(parts(selector, About::NamespaceLabel)),
        }
        Selector { requirements }
    }

    /// Every pod of every namespace.
    pub fn every_pod() -> Selector {
        Selector { requirements: BTreeSet::new() }
    }

    /// Without what it asks of labels that never count as a pod's own: nobody knows which pods have those, so it
    /// selects more pods, not fewer.
    pub(super) fn without_reserved(&self) -> Selector {
        let counts = |r: &&Requirement| r.about != About::Pod || !labels::is_reserved(r.short_key());
        Selector { requirements: self.requirements.iter().filter(counts).cloned().collect() }
    }

    /// Whether it selects the workloads with these labels.
    pub fn matches(&self, labels: &IdentityLabels) -> bool {
        labels.namespace().is_some() && self.requirements.iter().all(|r| r.holds(labels))
    }

    /// Keys of pod labels that it asks for, without source.
    pub fn pod_keys(&self) -> impl Iterator<Item = &str> {
        self.requirements.iter().filter(|r| r.about == About::Pod).map(Requirement::short_key)
    }

    /// Labels of which everything it selects has at least one; empty if there is no such list.
    /// A pod's own labels before its namespace: they tell more.
    pub(super) fn anchors(&self) -> Vec<(String, String)> {
        let positive = |r: &&Requirement| r.operator == Operator::In;
        let best = self.requirements.iter().filter(positive).min_by_key(|r| (r.about, r.values.len()));
        best.map_or(Vec::new(), |r| r.values.iter().map(|value| (r.key.clone(), value.clone())).collect())
    }
}

impl Requirement {
    fn holds(&self, labels: &IdentityLabels) -> bool {
        let value = labels.get(&self.key);
        match self.operator {
            Operator::In => value.is_some_and(|v| self.values.contains(v)),
            Operator::NotIn => !value.is_some_and(|v| self.values.contains(v)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    }

    /// The key as manifests write it.
    fn short_key(&self) -> &str {
        self.key.strip_prefix(self.about.prefix()).unwrap_or(&self.key)
    }
}

impl About {
    fn prefix(self) -> &'static str {
        match self {
            About::Pod => "k8s:",
            About::NamespaceLabel => labels::NAMESPACE_LABELS,
            About::NamespaceName => "",
        }
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |about| {
            let chosen = self.requirements.iter().filter(|r| r.about == about);
            chosen.map(words).collect::<Vec<_>>().join(", ")
        };
        let pods = list(About::Pod);
        let namespaces = list(About::NamespaceLabel);
        match pods.is_empty() {
            true => f.write_str("all pods")?,
            false => write!(f, "pods with {pods}")?,
        }
        if let Some(name) = self.requirements.iter().find(|r| r.about == About::NamespaceName) {
            let names: Vec<&str> = name.values.iter().map(String::as_str).collect();
            return write!(f, " in namespace {}", names.join(", "));
        }
        match namespaces.is_empty() {
            true => f.write_str(" in any namespace"),
            false => write!(f, " in namespaces with {namespaces}"),
        }
    }
}

fn words(requirement: &Requirement) -> String {
    let key = requirement.short_key();
    let values: Vec<&str> = requirement.values.iter().map(String::as_str).collect();
    let values = values.join(", ");
    match requirement.operator {
        Operator::In if requirement.values.len() == 1 => format!("{key}={values}"),
        Operator::In => format!("{key} in ({values})"),
        Operator::NotIn => format!("{key} not in ({values})"),
        Operator::Exists => key.to_string(),
        Operator::DoesNotExist => format!("no {key}"),
    }
}

fn parts(selector: &LabelSelector, about: About) -> impl Iterator<Item = Requirement> + '_ {
    let equal = selector.match_labels.iter().map(move |(key, value)| Requirement {
        about,
        key: format!("{}{key}", about.prefix()),
        operator: Operator::In,
        values: BTreeSet::from([value.clone()]),
    });
    let more = selector.match_expressions.iter().map(move |r| Requirement {
        about,
        key: format!("{}{}", about.prefix(), r.key),
        operator: r.operator,
        values: r.values.iter().cloned().collect(),
    });
    equal.chain(more)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::SelectorRequirement;

    fn one(key: &str, operator: Operator, values: &[&str]) -> LabelSelector {
        let values = values.iter().map(|v| v.to_string()).collect();
        let requirement = SelectorRequirement { key: key.into(), operator, values };
        LabelSelector { match_expressions: vec![requirement], ..LabelSelector::default() }
    }

    fn pod(labels: &str) -> IdentityLabels {
        IdentityLabels::parse(&format!("k8s:io.kubernetes.pod.namespace=shop;{labels}")).unwrap()
    }

    #[test]
    fn operators_are_those_of_kubernetes() {
        let cases = [
            (Operator::In, &["a", "b"][..], [true, false, false]),
            (Operator::NotIn, &["a", "b"][..], [false, true, true]),
            (Operator::Exists, &[][..], [true, true, false]),
            (Operator::DoesNotExist, &[][..], [false, false, true]),
        ];
        for (operator, values, expected) in cases {
            let selector = Selector::new(Some(&one("x", operator, values)), Scope::Named("shop"));
            let found = ["k8s:x=a", "k8s:x=c", "k8s:y=a"].map(|labels| selector.matches(&pod(labels)));
            assert_eq!(found, expected, "{selector}");
        }
    }

    #[test]
    fn only_pods_are_selected_and_only_of_the_scope() {
        assert!(!Selector::every_pod().matches(&IdentityLabels::reserved("world")));
        assert!(Selector::every_pod().matches(&pod("k8s:x=a")));
        assert!(!Selector::new(None, Scope::Named("other")).matches(&pod("k8s:x=a")));
        let team = one("team", Operator::In, &["retail"]);
        let selector = Selector::new(None, Scope::Labelled(&team));
        assert!(selector.matches(&pod("k8s:io.cilium.k8s.namespace.labels.team=retail")));
        assert!(!selector.matches(&pod("k8s:team=retail")), "a pod's label is not its namespace's");
        assert_eq!(selector.to_string(), "all pods in namespaces with team=retail");
    }
}
