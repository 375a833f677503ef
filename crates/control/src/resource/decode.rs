//! From documents to resources; Namespace, Pod and Node are read here.
//!
//! Every field that the Kubernetes API knows is accepted, needed or not, so that real manifests
//! pass; any other name is a spelling mistake and is refused.

use super::{
    Container, ContainerPort, DEFAULT_NAMESPACE, EnvVar, Metadata, NAMESPACE_NAME_LABEL, Namespace, Node, NodeAddress,
    NodeSpec, NodeStatus, Pod, PodIp, PodSpec, PodStatus, Protocol, Resource, ResourceError, endpoint_slice,
    network_policy, service, syntax, tree::Cursor,
};
use std::collections::BTreeSet;

/// Reads one document into `out`, unfolding `kind: List`.
pub fn document(cursor: &Cursor<'_>, out: &mut Vec<Resource>) -> Result<(), ResourceError> {
    let head = cursor.any_object()?;
    let kind_at = head.required("kind")?;
    let version_at = head.required("apiVersion")?;
    let (kind, version) = (kind_at.string()?, version_at.string()?);
    let wanted = match kind {
        "Namespace" | "Pod" | "Node" | "Service" | "List" => "v1",
        "EndpointSlice" => "discovery.k8s.io/v1",
        "NetworkPolicy" => "networking.k8s.io/v1",
        _ => {
            let problem = format!("\"{kind}\" is not a kind that is read here");
            return Err(kind_at.error(
                problem,
                "use Namespace, Pod, NetworkPolicy, Node, Service, EndpointSlice or List, or move it elsewhere",
            ));
        }
    };
    if version != wanted {
        return Err(version_at.error(format!("\"{version}\" does not go with {kind}"), format!("use {wanted}")));
    }
    match kind {
        "Namespace" => out.push(Resource::Namespace(namespace(cursor)?)),
        "Pod" => out.push(Resource::Pod(pod(cursor)?)),
        "Node" => out.push(Resource::Node(node(cursor)?)),
        "Service" => out.push(Resource::Service(service::decode(cursor)?)),
        "EndpointSlice" => out.push(Resource::EndpointSlice(endpoint_slice::decode(cursor)?)),
        "NetworkPolicy" => out.push(Resource::NetworkPolicy(network_policy::decode(cursor)?)),
        _ => {
            for item in cursor.object(&["apiVersion", "kind", "metadata", "items"])?.items("items")? {
                document(&item, out)?;
            }
        }
    }
    Ok(())
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
    let creation_timestamp = fields.string("creationTimestamp")?;
    let deletion_timestamp = fields.string("deletionTimestamp")?;
    Ok(Metadata { name, namespace, labels, annotations, creation_timestamp, deletion_timestamp })
}

/// Reads a protocol; TCP if absent.
pub fn protocol(cursor: Option<Cursor<'_>>) -> Result<Protocol, ResourceError> {
    let Some(at) = cursor else { return Ok(Protocol::Tcp) };
    let name = at.string()?;
    Protocol::from_name(name)
        .ok_or_else(|| at.error(format!("\"{name}\" is not a protocol"), "use TCP, UDP or SCTP, in capitals"))
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
            return Err(at.error(format!("\"{phase}\" is not a phase"), hint));
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
    Ok(PodSpec { node_name, service_account_name, host_network, containers })
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
