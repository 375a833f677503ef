//! Direct return: the node that chooses a backend sees nothing of what that answers.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use cirri_e2e::lab::Lab;
use socket2::{Domain, Socket, Type};

/// How long a connection may take; one that is refused is at once.
const PATIENCE: Duration = Duration::from_secs(20);

/// `alive` serves at its port, and nothing listens at `dead`.
const PODS: &str = "
apiVersion: v1
kind: Pod
metadata: {name: alive, namespace: shop}
spec: {nodeName: node1, containers: [{name: c, image: none, ports: [{containerPort: 80}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: dead, namespace: shop}
spec: {nodeName: node2, containers: [{name: c, image: none}]}
";

const SERVICE: &str = "
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop, annotations: {service.cilium.io/forwarding-mode: dsr}}
spec:
  type: NodePort
  clusterIP: 10.96.0.10
  ports: [{name: http, port: 80, nodePort: 30080}]
";

#[test]
fn a_port_whose_connection_was_refused_gets_another_backend_once_that_one_is_not_ready() {
    let lab = Lab::up("direct", 2, &[]).unwrap();
    lab.apply(PODS).unwrap();
    let addresses = lab.addresses().unwrap();
    let [alive, dead] = ["shop/alive", "shop/dead"].map(|pod| addresses[pod][0]);
    let state = |is_ready: bool| {
        let endpoint = |address, node, ready| {
            format!("{{addresses: [{address}], nodeName: {node}, conditions: {{ready: {ready}}}}}")
        };
        let endpoints = [endpoint(alive, "node1", true), endpoint(dead, "node2", is_ready)].join(", ");
        format!(
            "{PODS}{SERVICE}---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
             metadata: {{name: web-1, namespace: shop, labels: {{kubernetes.io/service-name: web}}}}\n\
             addressType: IPv4\nports: [{{name: http, port: 80}}]\nendpoints: [{endpoints}]\n"
        )
    };
    lab.apply(&state(true)).unwrap();
    let to = SocketAddr::new(addresses["node1"][0], 30080);
    let world = lab.netns("world").unwrap();
    let connect = |port: u16| world.run(|| connect(port, to)).unwrap();
    let refused: Vec<u16> = (40_000..40_032).filter(|port| is_refused(&connect(*port))).collect();
    assert!(!refused.is_empty() && refused.len() < 32, "either serves some of 32: {refused:?}");

    lab.apply(&state(false)).unwrap();
    for port in refused {
        connect(port).unwrap_or_else(|error| panic!("from the port {port} again: {error}"));
    }
}

fn connect(port: u16, to: SocketAddr) -> io::Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&SocketAddr::from(([0, 0, 0, 0], port)).into())?;
    socket.connect_timeout(&to.into(), PATIENCE)
}

fn is_refused(outcome: &io::Result<()>) -> bool {
    match outcome {
        Ok(()) => false,
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => true,
        Err(error) => panic!("{error}"),
    }
}
