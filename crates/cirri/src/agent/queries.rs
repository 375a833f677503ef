//! Answers about what the agent knows.

use std::collections::BTreeMap;
use std::net::IpAddr;

use cirri_abi::{CounterIndex, Direction, DropReason, Identity, MapKind, map};
use cirri_control::labels::IdentityLabels;
use cirri_control::policy::{self, Question, RuleVerdict};
use cirri_flow::{Names, Place, RuleText, Served, ServicePort};
use cirri_loader::Tables;

use super::core::Core;
use super::endpoint::Endpoint;
use super::narrowed::NO_ROOM;
use crate::api::{
    ApiError, CounterInfo, EndpointInfo, ExplainedDirection, ExplainedParty, Explanation, IdentityInfo, MapInfo,
    PeerStatus, PolicyExplain,
};
use crate::workload;

impl Core {
    /// Everything about a workload of this node.
    pub fn endpoint_info(&self, endpoint: &Endpoint) -> EndpointInfo {
        let mut state = self.rows.endpoints.state(&endpoint.id).unwrap_or_else(|| "pending".to_owned());
        if state == "done" {
            state = self.rows.rulesets.state(&endpoint.ruleset).unwrap_or_else(|| "pending".to_owned());
        }
        EndpointInfo {
            id: endpoint.id,
            namespace: endpoint.namespace.clone(),
            pod: endpoint.pod.clone(),
            state,
            identity: endpoint.identity,
            tunnel_identity: endpoint.tunnel_identity,
            labels: split(&endpoint.labels),
            addresses: endpoint.addresses().collect(),
            host_ifname: endpoint.host_ifname.clone(),
            ifindex: endpoint.ifindex,
            mac: workload::mac_text(endpoint.mac),
            network: endpoint.attachment.network.clone(),
            container_id: endpoint.attachment.container_id.clone(),
            ifname: endpoint.attachment.ifname.clone(),
            netns: endpoint.netns.clone(),
            ruleset: endpoint.ruleset,
            entries: self.rows.rulesets.desired(&endpoint.ruleset).map_or(0, |entries| entries.len()),
            generation: self.tables.epoch(endpoint.ruleset).unwrap_or_default(),
            ready_ms: endpoint.ready_ms,
        }
    }

    /// Every identity of the cluster.
    pub fn identity_infos(&self) -> Vec<IdentityInfo> {
        let one = |(identity, labels): (Identity, &IdentityLabels)| IdentityInfo {
            id: identity.id,
            labels: split(&labels.canonical()),
            endpoints: self.endpoints.values().filter(|endpoint| endpoint.identity == identity.id).count(),
            ruleset: self.ruleset_slots.get(&identity.id).unwrap_or_default(),
        };
        self.view.identities.iter().map(one).collect()
    }

    /// Whether a connection would pass, and why.
    ///
    /// # Errors
    /// An end or the protocol is not known.
    pub fn explain(&self, asked: &PolicyExplain) -> Result<Explanation, ApiError> {
        let protocol = match asked.proto.to_ascii_uppercase().as_str() {
            "TCP" => cirri_abi::proto::TCP,
            "UDP" => cirri_abi::proto::UDP,
            "SCTP" => cirri_abi::proto::SCTP,
            other => {
                return Err(ApiError::new("bad-request", format!("`{other}` is no protocol")).hint("tcp, udp, sctp"));
            }
        };
        // Both ends are asked about in one family: that of the address that was given, if any.
        let v6 = [&asked.from, &asked.to].iter().any(|end| end.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv6()));
        let from = self.party(&asked.from, v6)?;
        let to = self.party(&asked.to, v6)?;
        let ask = |direction, subject: &policy::Party, peer: &policy::Party| {
            subject.labels.namespace()?;
            let (from, to) = (from.clone(), to.clone());
            let answer = self.cluster.explain(&Question { direction, from, to, protocol, port: asked.port });
            let mut explained = explained(&answer);
            self.correct(&mut explained, subject, peer, direction, protocol, asked.port);
            Some(explained)
        };
        let egress = ask(policy::Direction::Egress, &from, &to);
        let ingress = ask(policy::Direction::Ingress, &to, &from);
        let denied = [&egress, &ingress].into_iter().flatten().any(|direction| direction.verdict != "allow");
        let shown = |name: &str, party: &policy::Party| ExplainedParty {
            name: name.to_owned(),
            identity: party.identity.id,
            labels: split(&party.labels.canonical()),
            block: party.address.map_or(0, |ip| self.cluster.blocks().block_of(ip.into())),
        };
        Ok(Explanation {
            verdict: if denied { "deny" } else { "allow" }.to_owned(),
            from: shown(&asked.from, &from),
            to: shown(&asked.to, &to),
            egress,
            ingress,
        })
    }

    /// What the rules say is not what is in force where a rule set has a flaw: then that is said.
    fn correct(
        &self,
        explained: &mut ExplainedDirection,
        subject: &policy::Party,
        peer: &policy::Party,
        direction: policy::Direction,
        protocol: u8,
        port: u16,
    ) {
        let here = subject.address.and_then(|ip| self.endpoint_at(ip));
        let slot = here.map(|endpoint| endpoint.ruleset).or_else(|| self.ruleset_slots.get(&subject.identity.id));
        if slot == Some(0) && peer.identity != Identity::HOST {
            explained.verdict = "deny".to_owned();
            explained.rule.push_str("; but no slot is left for its rule set, and nothing passes");
            return;
        }
        let Some(slot) = slot else { return };
        let narrowed = self.narrowed.rules.get(&slot);
        let flaws = self.flawed.get(&slot).into_iter().flatten().map(ToString::to_string);
        let flaws: Vec<String> = flaws.chain(narrowed.map(|_| NO_ROOM.to_owned())).collect();
        let in_force = narrowed.or_else(|| self.rows.rulesets.desired(&slot).map(AsRef::as_ref));
        let Some(in_force) = in_force.filter(|_| !flaws.is_empty()) else { return };
        let block = peer.address.map_or(0, |ip| self.cluster.blocks().block_of(ip.into()));
        let passes = policy::allows(in_force, [peer.identity.id, block], direction, protocol, port);
        if peer.identity == Identity::HOST || passes == (explained.verdict == "allow") {
            return;
        }
        explained.verdict = if passes { "allow" } else { "deny" }.to_owned();
        explained.rule.push_str(&format!("; but the rule set is not just what its policies say: {}", flaws.join("; ")));
    }

    /// The other nodes.
    pub fn peer_infos(&self) -> Vec<PeerStatus> {
        let one = |peer: &super::records::NodeRecord| PeerStatus {
            name: peer.name.clone(),
            addresses: peer.v4.map(IpAddr::V4).into_iter().chain(peer.v6.map(IpAddr::V6)).collect(),
            pod_cidrs: peer
                .pod_v4
                .map(|cidr| cidr.to_string())
                .into_iter()
                .chain(peer.pod_v6.map(|cidr| cidr.to_string()))
                .collect(),
            workloads: self.view.ips.values().filter(|record| record.node == peer.name).count(),
        };
        self.peers().map(one).collect()
    }

    /// The maps.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn map_infos(&self) -> Result<Vec<MapInfo>, ApiError> {
        let statuses = self.tables.status().map_err(|error| ApiError::new("internal", error))?;
        let one = |status: &cirri_loader::MapStatus| {
            let kind = map::ALL.iter().find(|map| map.name == status.name).map(|map| map.kind);
            let countable =
                kind.is_some_and(|kind| !matches!(kind, MapKind::Array | MapKind::PerCpuArray | MapKind::RingBuf));
            let entries = if countable { self.tables.dump(status.name, usize::MAX).ok() } else { None };
            MapInfo {
                name: status.name.to_owned(),
                kind: kind.map(|kind| format!("{kind:?}")).unwrap_or_default(),
                entries: entries.map(|entries| entries.len() as u64),
                max_entries: status.max_entries,
                key_size: status.key_size,
                value_size: status.value_size,
                memory_bytes: status.memory,
                about: status.about.to_owned(),
            }
        };
        Ok(statuses.iter().map(one).collect())
    }

    /// The packet path's counters by name, those that never counted left out.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn counters(&self) -> Result<BTreeMap<String, CounterInfo>, ApiError> {
        counters_by_name(&self.tables)
    }

    /// Who stands behind a name or an address.
    fn party(&self, text: &str, v6: bool) -> Result<policy::Party, ApiError> {
        if let Ok(address) = text.parse::<IpAddr>() {
            let identity = self.identity_at(address);
            let labels = self.view.identities.labels(identity).cloned().unwrap_or_default();
            return Ok(policy::Party { identity, labels, address: Some(address) });
        }
        let (namespace, pod) = text
            .split_once('/')
            .ok_or_else(|| ApiError::new("bad-request", format!("`{text}` is neither NAMESPACE/POD nor an address")))?;
        let of_pod = |record: &&super::records::IpRecord| record.namespace == namespace && record.pod == pod;
        let address = self.view.ips.values().filter(of_pod).map(|record| record.ip).find(|ip| ip.is_ipv6() == v6);
        if address.is_none() && !self.view.pods.contains_key(&(namespace.to_owned(), pod.to_owned())) {
            return Err(ApiError::new("not-found", format!("there is no pod {text}"))
                .hint("`cirri endpoint list` shows those of this node"));
        }
        let known = self.view.pods.get(&(namespace.to_owned(), pod.to_owned()));
        let labels = self.labels_of(known, namespace, pod, &self.cluster.label_filter());
        let identity = self.view.identities.find(&labels).unwrap_or(Identity::UNKNOWN);
        Ok(policy::Party { identity, labels, address })
    }

    fn identity_at(&self, address: IpAddr) -> Identity {
        if let Some(record) = self.view.ips.get(&address) {
            return Identity { id: record.identity };
        }
        let key = cirri_abi::IpcacheKey { prefix_len: 128, addr: address.into() };
        self.tables.ipcache.get(&key).ok().flatten().map_or(Identity::UNKNOWN, |row| row.identity)
    }
}

impl Names for Core {
    fn labels(&self, identity: Identity) -> Option<Vec<String>> {
        self.view.identities.labels(identity).map(|labels| split(&labels.canonical()))
    }

    fn place(&self, ip: IpAddr) -> Option<Place> {
        let node = |name: &str| Place { node: Some(name.to_owned()), ..Place::default() };
        let workload = |namespace: &str, pod: &str, on: &str| Place {
            namespace: Some(namespace.to_owned()),
            pod: Some(pod.to_owned()),
            node: Some(on.to_owned()),
        };
        if let Some(endpoint) = self.endpoint_at(ip) {
            return Some(workload(&endpoint.namespace, &endpoint.pod, &self.node.name));
        }
        if let Some(record) = self.view.ips.get(&ip) {
            return Some(workload(&record.namespace, &record.pod, &record.node));
        }
        if self.node.addresses.contains(&ip) {
            return Some(node(&self.node.name));
        }
        let has = |peer: &&super::records::NodeRecord| {
            peer.v4.map(IpAddr::V4) == Some(ip) || peer.v6.map(IpAddr::V6) == Some(ip)
        };
        self.peers().find(has).map(|peer| node(&peer.name))
    }

    fn backend(&self, number: u32) -> Option<Served> {
        self.serving.served(number)
    }

    fn service(&self, ip: IpAddr, port: u16, protocol: u8) -> Option<ServicePort> {
        self.serving.service_at(ip, port, protocol)
    }

    fn rule(&self, cookie: u32) -> Option<RuleText> {
        let rule = self.cluster.rule(cookie)?;
        Some(RuleText {
            policy: format!("{}/{}", rule.namespace, rule.policy),
            index: rule.index as u32,
            text: rule.text.clone(),
        })
    }
}

fn explained(answer: &policy::Explanation) -> ExplainedDirection {
    let mut rule = match &answer.rule {
        Some(rule) => {
            format!("policy {}/{} {} rule {}: {}", rule.namespace, rule.policy, rule.direction, rule.index, rule.text)
        }
        None => match answer.cookie {
            cirri_abi::Cookie::DEFAULT_ALLOW => "no policy selects it in this direction".to_owned(),
            cirri_abi::Cookie::OWN_NODE => "traffic with its own node always passes".to_owned(),
            _ => {
                let by: Vec<String> = answer.isolated_by.iter().map(ToString::to_string).collect();
                format!("implicit deny: {} select it and no rule allows this", by.join(", "))
            }
        },
    };
    if let Some(nearest) = answer.nearest.first() {
        let differs: Vec<String> = nearest.differs.iter().map(ToString::to_string).collect();
        rule.push_str(&format!(
            "; nearest: {}/{} rule {} ({}), {}",
            nearest.rule.namespace,
            nearest.rule.policy,
            nearest.rule.index,
            nearest.rule.text,
            differs.join(" and ")
        ));
    }
    let verdict = if answer.verdict == RuleVerdict::Allow { "allow" } else { "deny" };
    ExplainedDirection { verdict: verdict.to_owned(), rule, cookie: answer.cookie }
}

/// The packet path's counters by name, those that never counted left out.
///
/// # Errors
/// The kernel does not tell.
pub fn counters_by_name(tables: &Tables) -> Result<BTreeMap<String, CounterInfo>, ApiError> {
    let counters = tables.counters().map_err(|error| ApiError::new("internal", error))?;
    let mut named = BTreeMap::new();
    for (index, counter) in counters.iter().enumerate().filter(|(_, counter)| counter.packets > 0) {
        named.insert(counter_name(index as u32), CounterInfo { packets: counter.packets, bytes: counter.bytes });
    }
    Ok(named)
}

/// What a counter of the packet path counts.
pub(super) fn counter_name(index: u32) -> String {
    match index {
        CounterIndex::LOST_EVENTS => "events lost".to_owned(),
        CounterIndex::DECIDED => "slow path decided".to_owned(),
        CounterIndex::RENEWED => "recipes renewed".to_owned(),
        CounterIndex::PROMOTED => "connections established".to_owned(),
        _ => {
            let direction = Direction::name((index & 1) as u8);
            match (index / 2) as u8 {
                0 => format!("forwarded first packets {direction}"),
                code => format!("dropped {} {direction}", DropReason { code }.name()),
            }
        }
    }
}

fn split(canonical: &str) -> Vec<String> {
    canonical.split(';').filter(|label| !label.is_empty()).map(str::to_owned).collect()
}
