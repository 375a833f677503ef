//! Reading Service and EndpointSlice, and what of Pod concerns services.

use super::tests::{one, refused};
use super::*;

fn service(spec: &str) -> String {
    format!("{{apiVersion: v1, kind: Service, metadata: {{name: web, namespace: shop}}, spec: {{{spec}}}}}")
}

fn slice(rest: &str) -> String {
    let label = "labels: {kubernetes.io/service-name: web}";
    format!(
        "{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {{name: web-x, namespace: shop, {label}}}, {rest}}}"
    )
}

fn read(spec: &str) -> Service {
    let Resource::Service(service) = one(&service(spec)) else { panic!("not a service") };
    service
}

#[test]
fn a_service_as_an_api_server_writes_it_is_read_whole() {
    let text = "
apiVersion: v1
kind: Service
metadata:
  name: web
  namespace: shop
  creationTimestamp: 2026-01-02T03:04:05Z
  annotations: {service.cilium.io/lb-algorithm: maglev}
spec:
  type: LoadBalancer
  allocateLoadBalancerNodePorts: true
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10, 'fd00:96::a']
  ipFamilies: [IPv4, IPv6]
  ipFamilyPolicy: PreferDualStack
  externalIPs: [198.51.100.1]
  externalTrafficPolicy: Local
  internalTrafficPolicy: Cluster
  healthCheckNodePort: 30999
  loadBalancerSourceRanges: [' 192.0.2.0/24 ']
  publishNotReadyAddresses: true
  trafficDistribution: PreferClose
  selector: {app: web}
  sessionAffinity: ClientIP
  sessionAffinityConfig: {clientIP: {timeoutSeconds: 60}}
  ports:
  - {name: http, port: 80, targetPort: web, nodePort: 30080, appProtocol: http}
  - {name: dns, port: 53, protocol: UDP, targetPort: 5353}
status:
  conditions: [{type: Something, status: 'True'}]
  loadBalancer:
    ingress: [{ip: 203.0.113.9, ipMode: VIP}, {hostname: lb.example}, {ip: 203.0.113.10, ipMode: Proxy}]
";
    let resource = one(text);
    assert_eq!(resource.store_key(), "resources/Service/shop/web");
    let Resource::Service(it) = &resource else { panic!("not a service") };
    assert_eq!(it.spec.kind, ServiceType::LoadBalancer);
    assert_eq!(it.spec.cluster_ips.addresses().len(), 2);
    assert_eq!(it.spec.ip_families, [IpFamily::IPv4, IpFamily::IPv6]);
    assert_eq!(it.spec.client_ip_timeout, Some(60));
    assert_eq!(it.spec.health_check_node_port, Some(30999));
    assert_eq!(it.spec.load_balancer_source_ranges, ["192.0.2.0/24".parse().unwrap()]);
    assert_eq!(it.spec.ports[0].target_port, PortRef::Name("web".into()));
    assert_eq!((it.spec.ports[1].protocol, &it.spec.ports[1].target_port), (Protocol::Udp, &PortRef::Number(5353)));
    let ingress: Vec<_> = it.status.load_balancer.ingress.iter().map(|one| one.ip.to_string()).collect();
    assert_eq!(ingress, ["203.0.113.9"]);
    let json = resource.to_json();
    assert_eq!(Resource::from_json(&json).unwrap_or_else(|error| panic!("{error}\n{json}")), resource, "{json}");
}

#[test]
fn defaults_of_a_service_are_those_of_the_api_server() {
    let it = read("ports: [{port: 80, targetPort: 0, nodePort: 0}], clusterIP: '', sessionAffinity: None");
    assert_eq!(it.spec.kind, ServiceType::ClusterIP);
    assert_eq!(it.spec.cluster_ips, ClusterIps::Given(Vec::new()));
    assert_eq!((it.spec.ports[0].protocol, &it.spec.ports[0].target_port), (Protocol::Tcp, &PortRef::Number(80)));
    assert_eq!((it.spec.ports[0].name.as_deref(), it.spec.ports[0].node_port), (None, None));
    assert_eq!(it.spec.client_ip_timeout, None);
    assert_eq!(it.spec.internal_traffic_policy, TrafficPolicy::Cluster);
    assert_eq!(read("ports: [{port: 1}], sessionAffinity: ClientIP").spec.client_ip_timeout, Some(10_800));
    assert_eq!(read("ports: [{port: 1}], clusterIP: 'fd00::1'").spec.ip_families, [IpFamily::IPv6]);
    assert_eq!(read("clusterIP: None").spec.cluster_ips, ClusterIps::Headless);
    assert_eq!(read("type: ExternalName, externalName: example.com").spec.kind, ServiceType::ExternalName);
}

#[test]
fn a_service_that_cannot_be_is_refused_where_it_stands() {
    let cases = [
        ("type: Loadbalancer, ports: [{port: 1}]", "spec.type"),
        ("type: ClusterIP", "spec"),
        ("ports: []", "spec.ports"),
        ("ports: [{port: 0}]", "spec.ports[0].port"),
        ("ports: [{port: 65536}]", "spec.ports[0].port"),
        ("ports: [{port: '80'}]", "spec.ports[0].port"),
        ("ports: [{targetPort: 80}]", "spec.ports[0].port"),
        ("ports: [{port: 1, targetPort: 70000}]", "spec.ports[0].targetPort"),
        ("ports: [{port: 1, targetPort: '80'}]", "spec.ports[0].targetPort"),
        ("ports: [{port: 1, protocol: tcp}]", "spec.ports[0].protocol"),
        ("ports: [{port: 1, nodePort: 30000}]", "spec.ports[0].nodePort"),
        ("type: NodePort, ports: [{port: 1, nodePort: 70000}]", "spec.ports[0].nodePort"),
        ("ports: [{port: 1}, {port: 2}]", "spec.ports[0]"),
        ("ports: [{name: a, port: 1}, {name: a, port: 2}]", "spec.ports[1]"),
        ("ports: [{name: a, port: 1}, {name: b, port: 1}]", "spec.ports[1]"),
        (
            "type: NodePort, ports: [{name: a, port: 1, nodePort: 30000}, {name: b, port: 2, nodePort: 30000}]",
            "spec.ports[1]",
        ),
        ("ports: [{port: 1}], clusterIP: ten", "spec.clusterIP"),
        ("ports: [{port: 1}], clusterIP: 10.0.0.1, clusterIPs: [10.0.0.2]", "spec.clusterIP"),
        ("ports: [{port: 1}], clusterIPs: [10.0.0.1, 10.0.0.2]", "spec.clusterIPs[1]"),
        ("ports: [{port: 1}], clusterIPs: [None, 10.0.0.2]", "spec.clusterIPs[1]"),
        ("ports: [{port: 1}], clusterIP: None, type: NodePort", "spec"),
        ("ports: [{port: 1}], ipFamilies: [ipv4]", "spec.ipFamilies[0]"),
        ("ports: [{port: 1}], ipFamilies: [IPv6], clusterIP: 10.0.0.1", "spec.ipFamilies[0]"),
        ("ports: [{port: 1}], ipFamilyPolicy: Dual", "spec.ipFamilyPolicy"),
        ("ports: [{port: 1}], externalIPs: [127.0.0.1]", "spec.externalIPs[0]"),
        ("ports: [{port: 1}], externalTrafficPolicy: Local", "spec.externalTrafficPolicy"),
        ("ports: [{port: 1}], loadBalancerSourceRanges: [10.0.0.0/8]", "spec.loadBalancerSourceRanges[0]"),
        (
            "type: LoadBalancer, ports: [{port: 1}], loadBalancerSourceRanges: [10.0.0.0]",
            "spec.loadBalancerSourceRanges[0]",
        ),
        ("type: LoadBalancer, ports: [{port: 1}], healthCheckNodePort: 30000", "spec.healthCheckNodePort"),
        ("ports: [{port: 1}], sessionAffinity: clientip", "spec.sessionAffinity"),
        ("ports: [{port: 1}], sessionAffinityConfig: {clientIP: {}}", "spec.sessionAffinityConfig"),
        (
            "ports: [{port: 1}], sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {timeoutSeconds: 0}}",
            "timeoutSeconds",
        ),
        (
            "ports: [{port: 1}], sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {timeoutSeconds: 86401}}",
            "timeoutSeconds",
        ),
        ("ports: [{port: 1}], trafficDistribution: Near", "spec.trafficDistribution"),
        ("type: ExternalName", "spec"),
        ("ports: [{port: 1}], selectors: {a: b}", "spec.selectors"),
    ];
    for (spec, field) in cases {
        let error = refused(&service(spec));
        assert!(error.contains(&format!("{field}:")), "{spec}\n{error}");
    }
    assert_eq!(
        refused(&service("ports: [{port: 1}], sessionAffinity: ClientIp")),
        "test.yaml:1:117: Service shop/web: spec.sessionAffinity: \"ClientIp\" is not known; use None or ClientIP"
    );
}

#[test]
fn an_endpoint_slice_is_read_with_the_defaults_of_its_conditions() {
    let resource = one(&slice(
        "addressType: IPv4, ports: [{name: http, port: 8080}, {name: all}], endpoints: [
          {addresses: [10.0.0.1]},
          {addresses: [10.0.0.2], conditions: {ready: false}},
          {addresses: [10.0.0.4], conditions: {ready: false, terminating: true}},
          {addresses: [10.0.0.3], conditions: {ready: false, serving: true, terminating: true},
           nodeName: n1, zone: a, hints: {forZones: [{name: a}], forNodes: [{name: n1}]}, hostname: x,
           targetRef: {kind: Pod, namespace: shop, name: web-1, uid: u}, deprecatedTopology: {k: v}}]",
    ));
    assert_eq!(resource.store_key(), "resources/EndpointSlice/shop/web-x");
    let Resource::EndpointSlice(it) = &resource else { panic!("not a slice") };
    assert_eq!(it.service(), Some("web"));
    let conditions: Vec<_> =
        it.endpoints.iter().map(|e| (e.conditions.ready, e.conditions.serving, e.conditions.terminating)).collect();
    assert_eq!(conditions, [(true, true, false), (false, true, false), (false, true, true), (false, true, true)]);
    assert_eq!((it.ports[0].port, it.ports[1].port), (Some(8080), None));
    let json = resource.to_json();
    assert_eq!(Resource::from_json(&json).unwrap_or_else(|error| panic!("{error}\n{json}")), resource, "{json}");
    let Resource::EndpointSlice(names) = one(&slice("addressType: FQDN, endpoints: [{addresses: [example.com]}]"))
    else {
        panic!("not a slice")
    };
    assert_eq!(names.endpoints, []);
}

#[test]
fn an_endpoint_slice_that_cannot_be_is_refused_where_it_stands() {
    for (rest, field) in [
        ("endpoints: []", "addressType"),
        ("addressType: ipv4, endpoints: []", "addressType"),
        ("addressType: IPv4, endpoints: [{addresses: []}]", "endpoints[0].addresses"),
        ("addressType: IPv4, endpoints: [{conditions: {}}]", "endpoints[0].addresses"),
        ("addressType: IPv4, endpoints: [{addresses: [127.0.0.1]}]", "endpoints[0].addresses[0]"),
        ("addressType: IPv4, endpoints: [{addresses: [169.254.169.254]}]", "endpoints[0].addresses[0]"),
        ("addressType: IPv6, endpoints: [{addresses: ['fe80::1']}]", "endpoints[0].addresses[0]"),
        ("addressType: IPv4, endpoints: [{addresses: [10.0.0.1], node: n}]", "endpoints[0].node"),
        ("addressType: IPv4, endpoints: [{addresses: [10.0.0.1], conditions: {ready: yes}}]", "conditions.ready"),
        ("addressType: IPv4, endpoints: [], ports: [{port: 0}]", "ports[0].port"),
        ("addressType: IPv4, endpoints: [], ports: [{port: 1}, {port: 2}]", "ports[1]"),
    ] {
        let error = refused(&slice(rest));
        assert!(error.contains(&format!("{field}:")), "{rest}\n{error}");
    }
    let error = refused(&slice("addressType: IPv4, endpoints: [{addresses: ['fd00::1']}]"));
    assert!(
        error.ends_with(
            "endpoints[0].addresses[0]: fd00::1 is not IPv4, which the slice's addressType says; \
             put addresses of each family into a slice of their own"
        ),
        "{error}"
    );
}

#[test]
fn what_services_ask_of_a_pod_comes_back_as_it_went() {
    let resource = one("{apiVersion: v1, kind: Pod, metadata: {name: p, deletionTimestamp: 2026-01-01T00:00:00Z},
        spec: {containers: [{name: c, ports: [{containerPort: 1, hostPort: 2, hostIP: 192.0.2.1}, {containerPort: 3, hostPort: 0}]}]},
        status: {phase: Running, podIP: 10.0.0.1, conditions: [{type: Ready, status: 'False', reason: x}, {type: Initialized, status: 'True'}]}}");
    let Resource::Pod(pod) = &resource else { panic!("not a pod") };
    assert_eq!((pod.status.ready, pod.status.phase.as_deref()), (Some(false), Some("Running")));
    assert_eq!(pod.status.pod_ips, [PodIp { ip: "10.0.0.1".parse().unwrap() }]);
    let ports = &pod.spec.containers[0].ports;
    assert_eq!((ports[0].host_port, ports[0].host_ip), (Some(2), Some("192.0.2.1".parse().unwrap())));
    assert_eq!(ports[1].host_port, None);
    assert!(pod.metadata.deletion_timestamp.is_some());
    assert_eq!(Resource::from_json(&resource.to_json()).unwrap(), resource);
    refused("{apiVersion: v1, kind: Pod, metadata: {name: p}, spec: {containers: [{name: c}]}, status: {phase: Up}}");
}

#[test]
fn addresses_and_ports_that_multiply_beyond_what_one_service_may_have_are_refused() {
    let service = |ports: usize, addresses: usize| {
        let ports: Vec<String> = (0..ports).map(|port| format!("{{name: p{port}, port: {}}}", 1000 + port)).collect();
        let ips: Vec<String> = (0..addresses).map(|ip| format!("203.0.{}.{}", ip / 200, ip % 200 + 1)).collect();
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: s}}\nspec: {{ports: [{}], externalIPs: [{}]}}\n",
            ports.join(", "),
            ips.join(", ")
        )
    };
    one(&service(64, 128));
    let text = refused(&service(65, 128));
    assert!(text.contains("128 addresses with 65 ports") && text.contains("8192"), "{text}");
}
