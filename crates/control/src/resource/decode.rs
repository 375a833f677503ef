//! From documents to resources; Namespace, Pod and Node are read here.
//!
//! Every field that the Kubernetes API knows is accepted, needed or not, so that real manifests
//! pass; any other name is a spelling mistake and is refused.

use super::{
    Container, ContainerPort, DEFAULT_NAMESPACE, EnvVar, Metadata, NAMESPACE_NAME_LABEL, Namespace, Node, NodeAddress,
    NodeSpec, NodeStatus, Pod, PodIp, PodSpec, PodStatus, Protocol, Resource, ResourceError, STAND_IN,
    documents::Documents,
    endpoint_slice, network_policy, service, syntax,
    tree::{Cursor, is_nearly},
};
use crate::cut::cut;
use std::collections::BTreeSet;

/// Reads one document into `out`, unfolding lists.
pub fn document(cursor: &Cursor<'_>, out: &mut Documents) {
    one(cursor, None, out);
}

/// Reads one document; `implied` is the kind of one that does not say it, in a list of that kind.
fn one(cursor: &Cursor<'_>, implied: Option<&'static str>, out: &mut Documents) {
    let (kind_at, kind) = match (kind(cursor), implied) {
        (Ok(kind), _) => kind,
        (Err(_), Some(implied)) if cursor.any_object().is_ok_and(|it| it.get("kind").is_none()) => {
            (cursor.clone(), implied)
        }
        (Err(error), _) => return out.refuse(None, cursor.place(), error),
    };
    let Some(meant) = meant(cursor, kind) else { return unknown(cursor, &kind_at, kind, out) };
    if let Some(version) = foreign_version(cursor) {
        // Nothing of ours, unless the mistake is in the group: then what was good stays.
        let key = identity(cursor, meant).map(|metadata| store_key(meant, &metadata));
        out.unreadable.extend(key);
        return out.report(kind_at.foreign_kind(format!("{} of {}", cut(kind), cut(version))));
    }
    if meant == LIST && kind == meant {
        return list(cursor, None, out);
    }
    match read(cursor, &kind_at, kind, meant, implied) {
        Ok(resource) => {
            out.resources.push(resource);
            out.places.push(cursor.place());
        }
        Err(error) => {
            let identity = identity(cursor, meant);
            out.stand_ins.extend(identity.as_ref().and_then(|metadata| stand_in(cursor, meant, metadata)));
            let key = identity.as_ref().map(|metadata| store_key(meant, metadata));
            out.refuse(key, cursor.place(), error.about(&describe(kind, identity.as_ref())));
        }
    }
}

/// What lets nothing pass that a document may forbid which cannot be used.
fn stand_in(cursor: &Cursor<'_>, meant: &str, metadata: &Metadata) -> Option<Resource> {
    match meant {
        "NetworkPolicy" => network_policy::stand_in(cursor, metadata).map(Resource::NetworkPolicy),
        // A selector may exclude by a label that can be read.
        "Namespace" => {
            let fields = cursor.any_object().ok()?.get("metadata")?.any_object().ok()?;
            let labels = fields.get("labels").map(|at| at.readable_strings(syntax::label_key, syntax::label_value));
            let mut metadata = Metadata { labels: labels.unwrap_or_default(), ..metadata.clone() };
            metadata.labels.insert(NAMESPACE_NAME_LABEL.to_owned(), metadata.name.clone());
            metadata.annotations.insert(STAND_IN.to_owned(), "true".to_owned());
            Some(Resource::Namespace(Namespace { metadata }))
        }
        _ => None,
    }
}

/// A kind that is none of ours. A list of ours is unfolded; what Kubernetes or an extension has is nothing of ours; of
/// anything else nobody knows what it was meant to be: it holds what has its name.
fn unknown(cursor: &Cursor<'_>, kind_at: &Cursor<'_>, kind: &str, out: &mut Documents) {
    let of = item(kind);
    if let Some(of) = KINDS.iter().copied().find(|known| *known == of && ![kind, LIST].contains(known)) {
        return list(cursor, Some(of), out);
    }
    if FOREIGN_KINDS.contains(&of) || group(cursor).is_some_and(|group| !GROUPS.contains(&group)) {
        return out.report(kind_at.foreign_kind(cut(kind).into_owned()));
    }
    let hint = "correct it, or move the document elsewhere; what was in force under its name stays so meanwhile";
    let error = kind_at.error(format!("\"{}\" is no kind of Kubernetes", cut(kind)), hint);
    let may_be = |kind: &&str| identity(cursor, kind).map(|metadata| store_key(kind, &metadata));
    let keys: Vec<String> = KINDS.iter().filter(|kind| **kind != LIST).filter_map(may_be).collect();
    if keys.is_empty() {
        return out.refuse(None, cursor.place(), error);
    }
    out.unreadable.extend(keys);
    out.report(error);
}

/// The items of a list, each on its own; `of` is their kind if they need not say it.
fn list(cursor: &Cursor<'_>, of: Option<&'static str>, out: &mut Documents) {
    let name = of.map_or(LIST.to_owned(), |of| format!("{of}{LIST}"));
    let items = check_version(cursor, of.unwrap_or(LIST)).and_then(|()| {
        // A field beside them is a mistake, but `items` may be what it was meant to be. And without them it does not say
        // that there is nothing: a template that went wrong looks so.
        cursor.object(&["apiVersion", "kind", "metadata", "items"])?.required("items")?.list()
    });
    match items {
        Ok(items) => items.iter().for_each(|item| one(item, of, out)),
        Err(error) => out.refuse(None, cursor.place(), error.about(&name)),
    }
}

fn kind<'a>(cursor: &Cursor<'a>) -> Result<(Cursor<'a>, &'a str), ResourceError> {
    let at = cursor.any_object()?.required("kind")?;
    let kind = at.string()?;
    Ok((at, kind))
}

/// The kind that is read here and is written so, or nearly so; or the only one of its group.
fn meant(cursor: &Cursor<'_>, kind: &str) -> Option<&'static str> {
    let near = |known: &&str| *known == kind || is_nearly(kind, known, 1 + kind.len() / 8);
    let of_group = || match group(cursor)? {
        _ if FOREIGN_KINDS.contains(&item(kind)) || KINDS.contains(&item(kind)) => None,
        "networking.k8s.io" => Some("NetworkPolicy"),
        "discovery.k8s.io" => Some("EndpointSlice"),
        _ => None,
    };
    KINDS.iter().copied().find(near).or_else(of_group)
}

/// What a list of this kind is a list of; the kind itself if it is none.
fn item(kind: &str) -> &str {
    kind.strip_suffix(LIST).unwrap_or(kind)
}

fn version<'a>(cursor: &Cursor<'a>) -> Option<&'a str> {
    cursor.any_object().ok()?.get("apiVersion")?.string().ok()
}

/// The API group that a document names; `""` is that of Kubernetes' core.
fn group<'a>(cursor: &Cursor<'a>) -> Option<&'a str> {
    Some(version(cursor)?.split_once('/').map_or("", |(group, _)| group))
}

/// The apiVersion of a document, if its group is none of Kubernetes' own.
fn foreign_version<'a>(cursor: &Cursor<'a>) -> Option<&'a str> {
    let group = group(cursor)?;
    let ours = group.ends_with(".k8s.io") || GROUPS.iter().any(|known| is_nearly(group, known, 1 + known.len() / 8));
    if group.contains('.') && !ours { version(cursor) } else { None }
}

fn read(
    cursor: &Cursor<'_>,
    kind_at: &Cursor<'_>,
    kind: &str,
    meant: &str,
    implied: Option<&str>,
) -> Result<Resource, ResourceError> {
    if implied.is_some_and(|implied| implied != kind) {
        return Err(kind_at.error(format!("\"{}\" does not go with the list", cut(kind)), "use a `kind: List`"));
    }
    if kind != meant {
        return Err(kind_at.error(format!("\"{}\" is not a kind", cut(kind)), format!("did you mean {meant}?")));
    }
    if implied.is_none() || cursor.any_object()?.get("apiVersion").is_some() {
        check_version(cursor, kind)?;
    }
    Ok(match kind {
        "Namespace" => Resource::Namespace(namespace(cursor)?),
        "Pod" => Resource::Pod(pod(cursor)?),
        "Node" => Resource::Node(node(cursor)?),
        "Service" => Resource::Service(service::decode(cursor)?),
        "EndpointSlice" => Resource::EndpointSlice(endpoint_slice::decode(cursor)?),
        _ => Resource::NetworkPolicy(network_policy::decode(cursor)?),
    })
}

fn check_version(cursor: &Cursor<'_>, kind: &str) -> Result<(), ResourceError> {
    let wanted = match kind {
        "EndpointSlice" => "discovery.k8s.io/v1",
        "NetworkPolicy" => "networking.k8s.io/v1",
        _ => "v1",
    };
    let at = cursor.any_object()?.required("apiVersion")?;
    let version = at.string()?;
    if version == wanted {
        return Ok(());
    }
    Err(at.error(format!("\"{}\" does not go with {kind}", cut(version)), format!("use {wanted}")))
}

/// The name and namespace of a document that is refused, if there is no doubt about them: a field that nobody
/// knows may be a misspelt namespace.
fn identity(cursor: &Cursor<'_>, kind: &str) -> Option<Metadata> {
    let namespaced = !matches!(kind, "Namespace" | "Node");
    let at = cursor.object(ANY_TOP).ok()?.get("metadata")?;
    let fields = at.object(METADATA).ok()?;
    let name = fields.get("name")?.checked(syntax::dns_subdomain).ok()?.to_owned();
    let namespace = match (fields.get("namespace"), namespaced) {
        (Some(at), true) => Some(at.checked(syntax::dns_label).ok()?.to_owned()),
        (None, true) => Some(DEFAULT_NAMESPACE.to_owned()),
        (_, false) => None,
    };
    Some(Metadata { name, namespace, ..Metadata::default() })
}

fn store_key(kind: &str, metadata: &Metadata) -> String {
    format!("resources/{kind}/{}/{}", metadata.namespace.as_deref().unwrap_or("_"), metadata.name)
}

fn describe(kind: &str, metadata: Option<&Metadata>) -> String {
    let kind = cut(kind);
    match metadata {
        Some(Metadata { name, namespace: Some(namespace), .. }) => format!("{kind} {namespace}/{name}"),
        Some(Metadata { name, .. }) => format!("{kind} {name}"),
        None => kind.into_owned(),
    }
}

/// Reads `metadata`. `namespaced` is true for kinds that live in a namespace.
pub fn metadata(
    cursor: &Cursor<'_>,
    namespaced: bool,
    name_rule: fn(&str) -> Result<(), &'static str>,
) -> Result<Metadata, ResourceError> {
    let fields = cursor.object(METADATA)?;
    let name = fields.required("name")?.checked(name_rule)?.to_string();
    let namespace = match (fields.get("namespace"), namespaced) {
        (Some(at), true) => Some(at.checked(syntax::dns_label)?.to_string()),
        (None, true) => Some(DEFAULT_NAMESPACE.to_string()),
        (Some(at), false) => return Err(at.error("this kind is cluster-wide", "remove the namespace")),
        (None, false) => None,
    };
    let labels = match fields.get("labels") {
        Some(at) => at.string_map(syntax::label_key, syntax::label_value)?,
        None => Default::default(),
    };
    let annotations = match fields.get("annotations") {
        // Keys are checked in lower case, as the API server has it.
        Some(at) => at.string_map(|key| syntax::label_key(&key.to_lowercase()), |_| Ok(()))?,
        None => Default::default(),
    };
    let uid = fields.string("uid")?.filter(|uid| !uid.is_empty());
    let creation_timestamp = fields.string("creationTimestamp")?;
    let deletion_timestamp = fields.string("deletionTimestamp")?;
    Ok(Metadata { name, namespace, labels, annotations, uid, creation_timestamp, deletion_timestamp })
}

/// Reads a protocol; TCP if absent.
pub fn protocol(cursor: Option<Cursor<'_>>) -> Result<Protocol, ResourceError> {
    let Some(at) = cursor else { return Ok(Protocol::Tcp) };
    let name = at.string()?;
    Protocol::from_name(name)
        .ok_or_else(|| at.error(format!("\"{}\" is not a protocol", cut(name)), "use TCP, UDP or SCTP, in capitals"))
}

fn namespace(cursor: &Cursor<'_>) -> Result<Namespace, ResourceError> {
    let root = cursor.object(TOP)?;
    let mut metadata = metadata(&root.required("metadata")?, false, syntax::dns_label)?;
    metadata.labels.insert(NAMESPACE_NAME_LABEL.to_string(), metadata.name.clone());
    Ok(Namespace { metadata })
}

fn node(cursor: &Cursor<'_>) -> Result<Node, ResourceError> {
    let root = cursor.object(TOP)?;
    let metadata = metadata(&root.required("metadata")?, false, syntax::dns_subdomain)?;
    let mut spec = NodeSpec::default();
    if let Some(at) = root.get("spec") {
        let fields = at.object(NODE_SPEC)?;
        let mut all = fields.items("podCIDRs")?;
        if all.is_empty() {
            all.extend(fields.get("podCIDR"));
        }
        spec.pod_cidrs = all.iter().map(|one| one.parsed(syntax::cidr)).collect::<Result<_, _>>()?;
    }
    let mut status = NodeStatus::default();
    if let Some(at) = root.get("status") {
        for item in at.any_object()?.items("addresses")? {
            let fields = item.object(&["type", "address"])?;
            let kind = fields.required("type")?.string()?.to_string();
            status.addresses.push(NodeAddress { kind, address: fields.required("address")?.string()?.to_string() });
        }
    }
    Ok(Node { metadata, spec, status })
}

fn pod(cursor: &Cursor<'_>) -> Result<Pod, ResourceError> {
    let root = cursor.object(TOP)?;
    let metadata = metadata(&root.required("metadata")?, true, syntax::dns_subdomain)?;
    let spec = pod_spec(&root.required("spec")?)?;
    let mut status = PodStatus::default();
    if let Some(at) = root.get("status") {
        status = pod_status(&at)?;
    }
    Ok(Pod { metadata, spec, status })
}

fn pod_status(cursor: &Cursor<'_>) -> Result<PodStatus, ResourceError> {
    let fields = cursor.any_object()?;
    let mut status = PodStatus::default();
    for item in fields.items("podIPs")? {
        let ip = item.object(&["ip"])?.required("ip")?.parsed(syntax::address)?;
        status.pod_ips.push(PodIp { ip });
    }
    if let Some(at) = fields.get("podIP").filter(|_| status.pod_ips.is_empty())
        && !at.string()?.is_empty()
    {
        status.pod_ips.push(PodIp { ip: at.parsed(syntax::address)? });
    }
    if let Some(at) = fields.get("phase") {
        let phase = at.string()?;
        if !["Pending", "Running", "Succeeded", "Failed", "Unknown"].contains(&phase) {
            let hint = "use Pending, Running, Succeeded, Failed or Unknown";
            return Err(at.error(format!("\"{}\" is not a phase", cut(phase)), hint));
        }
        status.phase = Some(phase.to_string());
    }
    for item in fields.items("conditions")? {
        let condition = item.any_object()?;
        if condition.required("type")?.string()? == "Ready" {
            status.ready = Some(condition.required("status")?.string()? == "True");
        }
    }
    Ok(status)
}

fn pod_spec(cursor: &Cursor<'_>) -> Result<PodSpec, ResourceError> {
    let fields = cursor.object(POD_SPEC)?;
    let node_name = match fields.get("nodeName") {
        Some(at) => Some(at.checked(syntax::dns_subdomain)?.to_string()),
        None => None,
    };
    let account = fields.get("serviceAccountName").or_else(|| fields.get("serviceAccount"));
    let service_account_name = match account {
        Some(at) => at.checked(syntax::dns_subdomain)?.to_string(),
        None => "default".to_string(),
    };
    let host_network = fields.get("hostNetwork").map(|at| at.bool()).transpose()?.unwrap_or(false);
    let at = fields.required("containers")?;
    let mut names = BTreeSet::new();
    let mut containers = Vec::new();
    for item in at.list()? {
        let one = container(&item)?;
        if !names.insert(one.name.clone()) {
            return Err(item.error(format!("a second container is named \"{}\"", one.name), "give it another name"));
        }
        containers.push(one);
    }
    if containers.is_empty() {
        return Err(at.error("has no container", "add at least one"));
    }
    let mut init_containers = Vec::new();
    for item in fields.items("initContainers")? {
        let policy = item.any_object()?.get("restartPolicy");
        if policy.is_none_or(|policy| policy.string() != Ok("Always")) {
            continue;
        }
        let one = Container { restart_policy: Some("Always"), ..container(&item)? };
        if !names.insert(one.name.clone()) {
            return Err(item.error(format!("a second container is named \"{}\"", one.name), "give it another name"));
        }
        init_containers.push(one);
    }
    Ok(PodSpec { node_name, service_account_name, host_network, containers, init_containers })
}

fn container(cursor: &Cursor<'_>) -> Result<Container, ResourceError> {
    let fields = cursor.object(CONTAINER)?;
    let name = fields.required("name")?.checked(syntax::dns_label)?.to_string();
    let mut env = Vec::new();
    for item in fields.items("env")? {
        let var = item.object(&["name", "value", "valueFrom"])?;
        let name = var.required("name")?.string()?.to_string();
        env.push(EnvVar { name, value: var.string("value")?.unwrap_or_default() });
    }
    let mut names = BTreeSet::new();
    let mut ports = Vec::new();
    for item in fields.items("ports")? {
        let one = container_port(&item)?;
        if let Some(name) = &one.name
            && !names.insert(name.clone())
        {
            return Err(item.error(format!("a second port is named \"{name}\""), "give it another name"));
        }
        ports.push(one);
    }
    Ok(Container {
        name,
        image: fields.string("image")?.unwrap_or_default(),
        command: fields.strings("command")?,
        args: fields.strings("args")?,
        env,
        ports,
        restart_policy: None,
    })
}

fn container_port(cursor: &Cursor<'_>) -> Result<ContainerPort, ResourceError> {
    let fields = cursor.object(&["name", "containerPort", "protocol", "hostPort", "hostIP"])?;
    let name = match fields.get("name") {
        Some(at) => Some(at.checked(syntax::port_name)?.to_string()),
        None => None,
    };
    Ok(ContainerPort {
        name,
        container_port: fields.required("containerPort")?.port()?,
        protocol: protocol(fields.get("protocol"))?,
        // 0 and "" stand for nothing.
        host_port: fields.get("hostPort").filter(|at| !at.is_zero()).map(|at| at.port()).transpose()?,
        host_ip: match fields.get("hostIP") {
            Some(at) if !at.string()?.is_empty() => Some(at.parsed(syntax::address)?),
            _ => None,
        },
    })
}

const KINDS: &[&str] = &["Namespace", "Pod", "NetworkPolicy", "Node", "Service", "EndpointSlice", LIST];

const LIST: &str = "List";

/// The API groups of these kinds.
const GROUPS: &[&str] = &["", "networking.k8s.io", "discovery.k8s.io"];

/// The other kinds of these groups (Kubernetes 1.34).
const FOREIGN_KINDS: &[&str] = &[
    "Binding",
    "ComponentStatus",
    "ConfigMap",
    "Endpoints",
    "Event",
    "IPAddress",
    "Ingress",
    "IngressClass",
    "LimitRange",
    "PersistentVolume",
    "PersistentVolumeClaim",
    "PodTemplate",
    "ReplicationController",
    "ResourceQuota",
    "Secret",
    "ServiceAccount",
    "ServiceCIDR",
    "Status",
];

/// What stands at the top of any of them.
const ANY_TOP: &[&str] = &["apiVersion", "kind", "metadata", "spec", "status", "addressType", "endpoints", "ports"];

const TOP: &[&str] = &["apiVersion", "kind", "metadata", "spec", "status"];

const METADATA: &[&str] = &[
    "name",
    "generateName",
    "namespace",
    "labels",
    "annotations",
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "ownerReferences",
    "finalizers",
    "managedFields",
    "selfLink",
];

const NODE_SPEC: &[&str] =
    &["podCIDR", "podCIDRs", "providerID", "unschedulable", "taints", "configSource", "externalID"];

const POD_SPEC: &[&str] = &[
    "activeDeadlineSeconds",
    "affinity",
    "automountServiceAccountToken",
    "containers",
    "dnsConfig",
    "dnsPolicy",
    "enableServiceLinks",
    "ephemeralContainers",
    "hostAliases",
    "hostIPC",
    "hostNetwork",
    "hostPID",
    "hostUsers",
    "hostname",
    "hostnameOverride",
    "imagePullSecrets",
    "initContainers",
    "nodeName",
    "nodeSelector",
    "os",
    "overhead",
    "preemptionPolicy",
    "priority",
    "priorityClassName",
    "readinessGates",
    "resourceClaims",
    "resources",
    "restartPolicy",
    "runtimeClassName",
    "schedulerName",
    "schedulingGates",
    "securityContext",
    "serviceAccount",
    "serviceAccountName",
    "setHostnameAsFQDN",
    "shareProcessNamespace",
    "subdomain",
    "terminationGracePeriodSeconds",
    "tolerations",
    "topologySpreadConstraints",
    "volumes",
    "workloadRef",
];

const CONTAINER: &[&str] = &[
    "args",
    "command",
    "env",
    "envFrom",
    "image",
    "imagePullPolicy",
    "lifecycle",
    "livenessProbe",
    "name",
    "ports",
    "readinessProbe",
    "resizePolicy",
    "resources",
    "restartPolicy",
    "restartPolicyRules",
    "securityContext",
    "startupProbe",
    "stdin",
    "stdinOnce",
    "terminationMessagePath",
    "terminationMessagePolicy",
    "tty",
    "volumeDevices",
    "volumeMounts",
    "workingDir",
];
