//! What the agent knows and wants: the one owner of all its state.
//!
//! Sources change [`Core`] (the store through [`Core::apply`], CNI through `attach`), then call
//! [`Core::desire`], which makes stale tables again from scratch; only rows that differ become work
//! for the reconcilers (`reconcile`). Nothing is desired, and so nothing removed, before the
//! store was seen whole once: until then what is pinned stays in force.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use cirri_abi::{Identity, epoch_slot};
use cirri_control::cut::cut;
use cirri_control::ipam::Pool;
use cirri_control::labels::{IdentityLabels, LabelFilter};
use cirri_control::policy::{self, Cluster, PolicyId};
use cirri_control::resource::{Namespace, Pod};
use cirri_loader::net::{Link, Net};
use cirri_loader::{Datapath, Tables};
use cirri_store::{Entry, Event};
use ipnet::IpNet;

use super::drift::{Drift, Mend};
use super::endpoint::{Endpoint, Seen, is_meant};
use super::latency::Latency;
use super::ledger::Ledger;
use super::narrowed::Narrowed;
use super::node::Node;
use super::problems::Problems;
use super::records::{self, IpRecord};
use super::rows::Rows;
use super::rulesets::{self, Flaw};
use super::services::Serving;
use super::slots::Slots;
use super::view::{Change, Named, View};
use crate::api::{Attachment, EndpointAdd};
use crate::config::{Config, RoutingMode};
use crate::settings::Settings;

/// All state of the agent. Behind one lock; see the module.
pub struct Core {
    /// The configuration.
    pub config: Config,
    /// This node.
    pub node: Node,
    /// Its network.
    pub net: Net,
    /// What was changed of its settings.
    pub settings: Settings,
    /// The programs.
    pub datapath: Datapath,
    /// Their tables.
    pub tables: Tables,
    /// What the store says.
    pub view: View,
    /// Policies and identities, as the compiler knows them.
    pub cluster: Cluster,
    /// Cookies of the rules that an earlier run knew.
    pub(super) earlier_rules: BTreeSet<u32>,
    /// Slots of rule sets that are not just what policies say, and why; they are never more open.
    pub(super) flawed: BTreeMap<u16, Vec<Flaw>>,
    /// This node's pod ranges and what is given out of them; empty until they are allocated.
    pub pools: Vec<Pool>,
    /// Where workloads are written down.
    pub ledger: Ledger,
    /// Workloads by number.
    pub endpoints: BTreeMap<u16, Endpoint>,
    /// Numbers of workloads.
    pub endpoint_ids: Slots<Attachment>,
    /// Workloads that are attached, and whose runtimes have no answer yet.
    pub unanswered: BTreeSet<u16>,
    /// The workload whose device is not up yet: no route can lead to it.
    pub raising: Option<u16>,
    /// Slots of rule sets, by [`Endpoint::ruleset_of`].
    pub ruleset_slots: Slots<u32>,
    /// Epoch slots of routes to peers, by the peer's address.
    pub peer_slots: Slots<Ipv4Addr>,
    /// The desired tables.
    pub rows: Rows,
    /// Services.
    pub serving: Serving,
    /// Workloads here that other nodes still know by an earlier identity, and until when at the latest.
    pub announcing: BTreeMap<u16, Instant>,
    /// Revision of the newest identity that the rule sets know when they are as desired, ...
    pub newest_identity: u64,
    /// ... and that they know in the kernel.
    pub known_identities: u64,
    /// Labels of workloads here that have no number yet: somebody must allocate them.
    pub unnumbered: BTreeSet<IdentityLabels>,
    /// What is wrong with manifests in the folder.
    pub folder_errors: Vec<String>,
    /// Why what changed in the folder is not in the store yet.
    pub uncopied: Option<String>,
    /// Files of endpoints that could not be used at the start, and what came of it.
    pub spoilt_files: Vec<(String, String)>,
    /// Devices with this agent's programs of which nothing else was known at the start.
    pub strays: Vec<Link>,
    /// What is not well.
    pub problems: Problems,
    /// How the kernel and the store drift.
    pub drift: Drift,
    /// Records in the store, without a lease, that are to be written anew.
    pub mends: Vec<Mend>,
    /// Newest revision that a write of this node had.
    pub written: u64,
    /// How long changes take.
    pub latency: Latency,
    /// Why what is known could not be saved; it is tried again.
    pub unsaved: Option<String>,
    /// Whether the store holds more than was seen, when that was asked last.
    pub is_behind: bool,
    /// Newest revision that the desired tables were made from.
    pub desired_revision: u64,
    /// Newest revision that everything is reconciled for.
    pub enforced_revision: u64,
    /// Revision that must be seen before anything is desired; none: not known yet.
    pub needed_revision: Option<u64>,
    /// Whether the tables were ever filled. Until then an empty table wants nothing removed.
    pub filled: bool,
    /// Whether a change was written without moving all epochs: an earlier run was killed in the middle of one, or the
    /// kernel refused it. Then all move before the next begins.
    pub interrupted: bool,
    /// Slots whose rule set in force is an earlier one: the kernel refused the one that is desired.
    pub(super) rulesets_behind: BTreeSet<u16>,
    /// Rule sets that allow less than they should, as networks cannot be told apart.
    pub(super) narrowed: Narrowed,
    /// Whether what other versions left was removed.
    pub retired: bool,
    /// Identities whose rule set must be compiled again.
    pub(super) dirty: BTreeSet<u32>,
    /// Who workloads are must be looked at again.
    labels_stale: bool,
    /// Which identities are known must be looked at again.
    identities_stale: bool,
    /// Rows of tables other than the rule sets' must be made again.
    rows_stale: bool,
}

impl Core {
    /// Knows nothing yet.
    pub fn new(config: Config, node: Node, net: Net, settings: Settings, datapath: Datapath) -> Core {
        let mut cluster = Cluster::default();
        for (identity, labels) in cirri_control::identity::reserved() {
            cluster.upsert_identity(identity, labels);
        }
        Core {
            serving: Serving::new(&config, &node, datapath.tables()),
            ledger: Ledger::of(&config),
            tables: datapath.tables().clone(),
            config,
            node,
            net,
            settings,
            datapath,
            view: View::default(),
            cluster,
            earlier_rules: BTreeSet::new(),
            flawed: BTreeMap::new(),
            pools: Vec::new(),
            endpoints: BTreeMap::new(),
            endpoint_ids: Slots::new(1..=u16::MAX),
            raising: None,
            ruleset_slots: Slots::new(epoch_slot::FIRST_RULESET..=epoch_slot::LAST_RULESET),
            peer_slots: Slots::new(epoch_slot::FIRST_PEER..=epoch_slot::LAST_PEER),
            rows: Rows::new(),
            announcing: BTreeMap::new(),
            newest_identity: 0,
            known_identities: 0,
            unnumbered: BTreeSet::new(),
            folder_errors: Vec::new(),
            uncopied: None,
            spoilt_files: Vec::new(),
            strays: Vec::new(),
            problems: Problems::default(),
            drift: Drift::default(),
            mends: Vec::new(),
            written: 0,
            latency: Latency::default(),
            unsaved: None,
            is_behind: false,
            desired_revision: 0,
            enforced_revision: 0,
            needed_revision: None,
            filled: false,
            interrupted: false,
            rulesets_behind: BTreeSet::new(),
            narrowed: Narrowed::default(),
            unanswered: BTreeSet::new(),
            retired: false,
            dirty: BTreeSet::new(),
            labels_stale: true,
            identities_stale: true,
            rows_stale: true,
        }
    }

    /// Whether the store was seen whole and the node has its ranges.
    pub fn is_ready(&self) -> bool {
        let seen = self.needed_revision.is_some_and(|needed| self.view.revision >= needed);
        self.view.synced && seen && !self.pools.is_empty()
    }

    /// Takes in what an earlier run saved, before the store is asked.
    pub fn restore(&mut self, saved: Vec<Entry>) {
        let is_refused = |entry: &Entry| records::refused_resource(&entry.key).is_some();
        let (refused, in_force): (Vec<Entry>, Vec<Entry>) = saved.into_iter().partition(is_refused);
        for entry in in_force {
            let changes = self.view.restore(entry.key, entry.value);
            let (policies, others) = changes.into_iter().partition(|change| matches!(change, Change::PolicyPut(..)));
            self.take_again(policies);
            self.take(others);
        }
        self.earlier_rules = self.cluster.rules().map(|rule| rule.cookie).collect();
        // It is saved already.
        self.view.take_unsaved();
        // Weighed again, once all is there that they were refused for.
        for entry in refused {
            let changes = self.view.restore(entry.key, entry.value);
            self.take(changes);
        }
    }

    /// Takes in what the store says.
    pub fn apply(&mut self, event: Event) {
        let is_complete = matches!(event, Event::Snapshot(..) | Event::Progress(_));
        let changes = self.view.apply(event);
        self.take(changes);
        if is_complete {
            let changed = self.retry_policies();
            self.note(changed);
        }
    }

    /// Forgets what agents wrote into a former store, when that has ended: see [`View::end_records`]. Whether anything has.
    pub fn end_held_records(&mut self, store_answers: bool, now: Instant) -> bool {
        let lease = Duration::from_secs(self.config.store.etcd.lease_seconds);
        let changes = self.view.end_records(store_answers, lease, now);
        let ended = !changes.is_empty();
        self.take(changes);
        ended
    }

    fn take(&mut self, changes: Vec<Change>) {
        let mut changed = policy::Change::default();
        for change in changes {
            match change {
                Change::PolicyPut(name, text) => changed.merge(self.take_policy(&name, text)),
                Change::PolicyGone(name) => {
                    changed.merge(self.cluster.remove_policy(&PolicyId::network_policy(&name.0, &name.1)));
                }
                Change::IdentityPut(identity) => {
                    self.labels_stale = true;
                    self.identities_stale = true;
                    if let Some(labels) = self.view.identities.labels(identity) {
                        changed.merge(self.cluster.upsert_identity(identity, labels.clone()));
                    }
                }
                // Who a workload is does not become unknown because a record is gone.
                Change::IdentityGone(identity) if self.is_here(identity) => self.labels_stale = true,
                Change::IdentityGone(identity) => {
                    self.identities_stale = true;
                    changed.merge(self.cluster.remove_identity(identity));
                }
                Change::Labels => self.labels_stale = true,
                Change::Addresses => self.rows_stale = true,
                Change::Workload(named) => self.place(&named),
                Change::Peer(node) => self.place_node(&node),
                Change::Source(resource) => self.serving.sources.upsert(&resource),
                Change::SourceGone(kind, namespace, name) => {
                    self.serving.sources.remove(&kind, namespace.as_deref(), &name);
                }
            }
        }
        self.note(changed);
    }

    /// What the change touches must be made again.
    pub(super) fn note(&mut self, changed: policy::Change) {
        self.labels_stale |= changed.labels;
        self.rows_stale |= changed.blocks;
        self.dirty.extend(changed.identities().map(|identity| identity.id));
    }

    /// The identity was just allocated here; no need to wait until the store says so too.
    pub fn learn_identity(&mut self, identity: Identity, labels: &IdentityLabels) {
        if self.view.identities.insert(identity, labels.clone()) {
            self.labels_stale = true;
            self.identities_stale = true;
            let changed = self.cluster.upsert_identity(identity, labels.clone());
            self.dirty.extend(changed.identities().map(|identity| identity.id));
        }
    }

    /// Tells services where a pod is, as far as Cirri knows.
    pub fn place(&mut self, named: &Named) {
        let (namespace, name) = named;
        let pod = self.view.pods.get(named);
        // What ran under the name before, here or elsewhere, may still run.
        let here = |endpoint: &&Endpoint| {
            let is_its = pod.is_none_or(|pod| endpoint.is_of(pod, &self.node.name));
            endpoint.namespace == *namespace && endpoint.pod == *name && is_its
        };
        let there = |record: &&IpRecord| {
            let on = pod.and_then(|pod| pod.spec.node_name.as_deref());
            record.node != self.node.name && on.is_none_or(|on| record.node == on)
        };
        let mut addresses: Vec<IpAddr> = self.endpoints.values().filter(here).flat_map(|it| self.main_of(it)).collect();
        let mut node = (!addresses.is_empty()).then(|| self.node.name.clone());
        // What this node published is known here already, and perhaps out of date in the store.
        for record in self.view.records_of(named).filter(there) {
            addresses.push(record.ip);
            node.get_or_insert_with(|| record.node.clone());
        }
        if let Some(Pod { spec, .. }) = pod
            && spec.host_network
            && let Some(on) = &spec.node_name
        {
            let own = (self.node.name == *on).then_some((Some(self.node.v4), self.node.v6));
            let of = own.or_else(|| self.view.nodes.get(on).map(|record| (record.v4, record.v6)));
            addresses.extend(of.and_then(|(v4, _)| v4).map(IpAddr::V4));
            addresses.extend(of.and_then(|(_, v6)| v6).map(IpAddr::V6));
            node = Some(on.clone());
        }
        self.serving.sources.set_pod_addresses(namespace, name, &addresses, node.as_deref());
    }

    /// The addresses by which others know a workload's container: of several attachments those that have the default
    /// route, else the first's, as Kubernetes has one address of each family for a pod.
    fn main_of(&self, endpoint: &Endpoint) -> Vec<IpAddr> {
        let before = |ip: IpAddr| {
            let rival = |other: &Endpoint| other.has_default.get(ip) || other.id < endpoint.id;
            self.beside(endpoint).any(rival)
        };
        endpoint.addresses().filter(|ip| endpoint.has_default.get(*ip) || !before(*ip)).collect()
    }

    /// The same for a node and the pods that have its addresses.
    fn place_node(&mut self, node: &str) {
        let record = self.view.nodes.get(node);
        let addresses = record.map(|record| [record.v4.map(IpAddr::V4), record.v6.map(IpAddr::V6)]);
        let addresses: Vec<IpAddr> = addresses.into_iter().flatten().flatten().collect();
        self.serving.sources.set_node_addresses(node, &addresses);
        let on_it = |pod: &&Pod| pod.spec.host_network && pod.spec.node_name.as_deref() == Some(node);
        let pods: Vec<Named> =
            self.view.pods.iter().filter(|(_, pod)| on_it(pod)).map(|(named, _)| named.clone()).collect();
        for named in pods {
            self.place(&named);
        }
    }

    /// The node's addresses changed.
    pub fn set_addresses(&mut self, addresses: Vec<IpAddr>) {
        self.node.addresses = addresses;
        self.serving.set_node(&self.config, &self.node);
        self.touch();
    }

    /// This node's workloads, ranges or addresses changed.
    pub fn touch(&mut self) {
        self.labels_stale = true;
        self.rows_stale = true;
    }

    /// Whether a workload of this node has the identity.
    fn is_here(&self, identity: Identity) -> bool {
        self.endpoints.values().any(|endpoint| endpoint.identity == identity.id)
    }

    /// Who a pod is by what was seen of it.
    pub fn labels_of_seen(&self, seen: &Seen, namespace: &str, pod: &str, filter: &LabelFilter) -> IdentityLabels {
        self.labels(seen.pod.as_ref(), seen.namespace.as_ref(), namespace, pod, filter)
    }

    /// Who a pod is. One without a resource of its own (`known`) is known by its namespace alone.
    pub fn labels_of(&self, known: Option<&Pod>, namespace: &str, pod: &str, filter: &LabelFilter) -> IdentityLabels {
        self.labels(known, self.view.namespaces.get(namespace), namespace, pod, filter)
    }

    /// The Pod that a runtime means.
    pub fn meant(&self, asked: &EndpointAdd) -> Option<&Pod> {
        let named = self.view.pods.get(&(asked.namespace.clone(), asked.pod.clone()));
        named.filter(|pod| is_meant(pod, &asked.pod_uid, &self.node.name))
    }

    /// What the store shows of the pod that a runtime means, and of its namespace.
    pub fn seen(&self, asked: &EndpointAdd) -> Seen {
        let mut seen = Seen::default();
        seen.update(self.meant(asked), self.view.namespaces.get(&asked.namespace));
        seen
    }

    /// Why there is none, in words.
    pub fn unseen(&self, asked: &EndpointAdd) -> String {
        let EndpointAdd { namespace, pod, pod_uid, .. } = asked;
        let Some(other) = self.view.pods.get(&(namespace.clone(), pod.clone())) else {
            return format!("the store has no Pod {namespace}/{pod}");
        };
        match &other.metadata.uid {
            Some(uid) if !pod_uid.is_empty() => {
                format!("the store's Pod {namespace}/{pod} is another one (UID {}, not {})", cut(uid), cut(pod_uid))
            }
            _ => {
                let on = other.spec.node_name.as_deref().unwrap_or_default();
                format!("the store's Pod {namespace}/{pod} is of node {}, and this is {}", cut(on), self.node.name)
            }
        }
    }

    /// Who a workload here is: by what the store says of its pod and namespace or, of what is gone
    /// while it still runs, by what the store said last.
    fn labels_of_endpoint(&self, endpoint: &Endpoint, filter: &LabelFilter) -> IdentityLabels {
        let space = self.view.namespaces.get(&endpoint.namespace).or(endpoint.seen.namespace.as_ref());
        self.labels(self.pod_of(endpoint), space, &endpoint.namespace, &endpoint.pod, filter)
    }

    /// The pod of a workload, as the store says or said last.
    pub fn pod_of<'a>(&'a self, endpoint: &'a Endpoint) -> Option<&'a Pod> {
        let named = (endpoint.namespace.clone(), endpoint.pod.clone());
        let now = self.view.pods.get(&named).filter(|pod| endpoint.is_of(pod, &self.node.name));
        now.or(endpoint.seen.pod.as_ref())
    }

    fn labels(
        &self,
        pod: Option<&Pod>,
        space: Option<&Namespace>,
        namespace: &str,
        name: &str,
        filter: &LabelFilter,
    ) -> IdentityLabels {
        let cluster = &self.config.cluster.name;
        match pod {
            Some(pod) => IdentityLabels::of_pod(pod, space, cluster, filter),
            None => IdentityLabels::of_pod(&unlabelled(namespace, name), space, cluster, filter),
        }
    }

    /// Fills the desired tables from all that is known. Nothing before [`Core::is_ready`].
    pub fn desire(&mut self) {
        if !self.is_ready() {
            return;
        }
        if std::mem::take(&mut self.labels_stale) || self.has_slot_for_another() {
            self.identify();
            self.desire_per_packet();
        }
        if self.rows_stale || !self.dirty.is_empty() || self.has_strangers() {
            self.desire_rulesets();
        }
        if std::mem::take(&mut self.identities_stale) {
            self.desire_identities();
        }
        if std::mem::take(&mut self.rows_stale) {
            self.desire_rows();
        }
        if self.serving.take_changes() {
            // Whether a backend is on this node stands there.
            self.rows.node.set("node", self.node_config());
        }
        if !self.filled {
            self.desire_sockets();
        }
        self.filled = true;
        self.desired_revision = self.view.revision;
    }

    /// Gives every workload the labels that it has now, and their identity. Its own rules follow its labels at once;
    /// others know it by its former number until its labels have one.
    fn identify(&mut self) {
        let filter = self.cluster.label_filter();
        let mut unnumbered = BTreeSet::new();
        let mut moved = Vec::new();
        self.remember_seen();
        for endpoint in self.endpoints.values() {
            let labels = self.labels_of_endpoint(endpoint, &filter);
            let (found, line) = (self.view.identities.find(&labels), labels.canonical());
            let is_same = match found {
                Some(identity) => identity.id == endpoint.identity && !endpoint.unnumbered,
                None => line == endpoint.labels,
            };
            if !is_same || rulesets::can_take_slot(endpoint, &self.ruleset_slots) {
                moved.push((endpoint.id, found, line));
            }
            if found.is_none() {
                unnumbered.insert(labels);
            }
        }
        self.unnumbered = unnumbered;
        let (now, tunnelled) = (Instant::now(), self.config.routing.mode == RoutingMode::Overlay);
        for (id, found, labels) in moved {
            let Some(endpoint) = self.endpoints.get_mut(&id) else { continue };
            let identity = found.unwrap_or(endpoint.identity());
            if identity.id != endpoint.identity {
                tracing::info!(endpoint = id, from = endpoint.identity, to = identity.id, "identity changed");
            } else if found.is_none() {
                tracing::info!(endpoint = id, labels, "its labels have no number yet");
            }
            self.rows_stale = true;
            if tunnelled {
                // The others may not know it yet: `announce` tells them when they do.
                let told = if endpoint.tunnel_identity == 0 { endpoint.identity } else { endpoint.tunnel_identity };
                endpoint.tunnel_identity = if told == identity.id { 0 } else { told };
                self.announcing.entry(id).or_insert(now + self.config.cluster.identity_grace());
            }
            endpoint.unnumbered = found.is_none() && (endpoint.unnumbered || endpoint.labels != labels);
            endpoint.identity = identity.id;
            endpoint.labels = labels;
            if !rulesets::take_slot(endpoint, &mut self.ruleset_slots) {
                tracing::error!(endpoint = id, "no slot left for its rule set; nothing passes until there is one");
            }
            if endpoint.unnumbered {
                // Its slot may have the rules of earlier labels.
                self.dirty.insert(identity.id);
                self.flawed.remove(&endpoint.ruleset);
            }
            if let Err(error) = self.ledger.save(endpoint) {
                tracing::warn!(endpoint = id, %error, "its file is behind; a restart repairs it");
            }
        }
    }

    /// Keeps what the store says of the pods and namespaces of workloads here: should it go while
    /// they still run, they stay who they are, also after a restart.
    fn remember_seen(&mut self) {
        for endpoint in self.endpoints.values_mut() {
            let named = (endpoint.namespace.clone(), endpoint.pod.clone());
            let pod = self.view.pods.get(&named).filter(|pod| endpoint.is_of(pod, &self.node.name));
            if endpoint.remember(pod, self.view.namespaces.get(&endpoint.namespace))
                && let Err(error) = self.ledger.save(endpoint)
            {
                tracing::warn!(endpoint = endpoint.id, %error, "its file is behind; a restart repairs it");
            }
        }
    }

    /// The store was seen whole again: what this agent published and is not there (any more), or
    /// was left there by an earlier run, is put right.
    pub fn compare_published(&mut self) {
        let desired: Vec<(String, Vec<u8>)> =
            self.rows.published.iter().map(|(key, value)| (key.clone(), value.clone())).collect();
        for (key, value) in desired {
            if self.view.value(&key) != Some(value.as_slice()) {
                self.rows.published.suspect(&key);
            }
        }
        self.note_given();
        let prefix = records::ip_prefix(&self.node.name);
        for key in self.view.below(&prefix) {
            let key = key.to_owned();
            if self.rows.published.desired(&key).is_none() {
                // Whatever it says, it hangs on the lease of an earlier run: to be written or removed.
                self.rows.published.adopt(key, Vec::new());
            }
        }
    }

    /// The node's range of a family.
    pub fn pod_cidr(&self, v6: bool) -> Option<IpNet> {
        self.pools.iter().map(Pool::cidr).find(|cidr| cidr.addr().is_ipv6() == v6)
    }

    /// The workload with an address.
    pub fn endpoint_at(&self, ip: IpAddr) -> Option<&Endpoint> {
        self.endpoints.values().find(|endpoint| endpoint.addresses().any(|address| address == ip))
    }

    /// The workload of an attachment.
    pub fn endpoint_of(&self, attachment: &Attachment) -> Option<&Endpoint> {
        // An earlier version did not ask for the network.
        let unnamed = || self.endpoint_ids.get(&Attachment { network: String::new(), ..attachment.clone() });
        self.endpoints.get(&self.endpoint_ids.get(attachment).or_else(unnamed)?)
    }
}

/// A pod of which only the name is known.
fn unlabelled(namespace: &str, name: &str) -> Pod {
    let metadata = cirri_control::resource::Metadata {
        name: name.to_owned(),
        namespace: Some(namespace.to_owned()),
        ..Default::default()
    };
    let spec = cirri_control::resource::PodSpec {
        node_name: None,
        service_account_name: "default".to_owned(),
        host_network: false,
        containers: Vec::new(),
        init_containers: Vec::new(),
    };
    Pod { metadata, spec, status: Default::default() }
}
