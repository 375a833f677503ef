//! `cirri lb` behind BGP: a router learns the service's address from BIRD beside the load balancer, as
//! docs/guide/load-balancer.md describes. Two devices, so packets go in by one and out by the other. Needs
//! root.

use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use cirri_e2e::edge::{self, PATIENCE, Server, Talk, VIP, run};
use cirri_e2e::kernel::TestNamespace;
use cirri_e2e::lab::{binary, eventually};

/// BGP speakers say hello first.
const CONVERGED: Duration = Duration::from_secs(60);

/// A process that ends with its guard.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Ended already, perhaps.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn spawn(place: &TestNamespace, program: &Path, arguments: &[&str], log: PathBuf) -> Running {
    let log = std::fs::File::create(log).expect("a log");
    let child = place
        .namespace
        .run(|| Command::new(program).args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn());
    Running(child.expect("entered").unwrap_or_else(|error| panic!("{}: {error}", program.display())))
}

/// A cable between two namespaces: name, device and address of both ends.
fn cable(a: (&TestNamespace, &str, &str), b: (&TestNamespace, &str, &str)) {
    let line = format!("ip link add {} type veth peer name {} netns {}", a.1, b.1, b.0.name());
    run(a.0, &line);
    for (place, device, address) in [a, b] {
        run(place, &format!("ip link set {device} up"));
        run(place, &format!("ip address add {address} dev {device}"));
        run(place, &format!("ethtool -K {device} gro on tx off"));
    }
}

fn bird(place: &TestNamespace, directory: &Path, name: &str, config: &str) -> (Running, String) {
    let path = |what: &str| directory.join(format!("{name}.{what}"));
    let text = |path: PathBuf| path.to_string_lossy().into_owned();
    std::fs::write(path("conf"), config).expect("written");
    let (config, socket, pid) = (text(path("conf")), text(path("ctl")), text(path("pid")));
    let arguments = ["-f", "-c", &config, "-s", &socket, "-P", &pid];
    (spawn(place, Path::new("/usr/sbin/bird"), &arguments, path("log")), socket)
}

#[test]
fn a_router_learns_the_address_by_bgp_and_forgets_it_when_it_is_withdrawn() {
    let [client, router, lb, backend] = [(); 4].map(|()| TestNamespace::new());
    let directory = tempfile::tempdir().unwrap();
    cable((&client, "eth0", "10.78.1.2/24"), (&router, "clients", "10.78.1.1/24"));
    cable((&router, "lbs", "10.78.2.1/24"), (&lb, "eth0", "10.78.2.2/24"));
    cable((&lb, "eth1", "10.78.3.1/24"), (&backend, "eth0", "10.78.3.11/24"));
    run(&client, "ip route add default via 10.78.1.1");
    run(&lb, "ip route add default via 10.78.2.1");
    run(&backend, "ip route add default via 10.78.3.1");
    run(&router, "sysctl -qw net.ipv4.ip_forward=1");

    let instance = format!("edgebgp-{}", std::process::id());
    let file = directory.path().join("lb.yaml");
    let text = format!(
        "devices: [eth0, eth1]
address: 10.78.3.1
stateDir: {}/state
bpf: {{instance: {instance}, maps: {{flows: 16384, pending: 16384}}}}
services: [{{name: web, address: {VIP}, port: 80, backends: [{{address: 10.78.3.11, port: 8080}}]}}]
",
        directory.path().display()
    );
    std::fs::write(&file, text).unwrap();
    let _server = Server::start(&backend, "b1", 8080);
    let file_text = file.to_string_lossy().into_owned();
    let binary = binary().unwrap();
    let balancing = spawn(&lb, &binary, &["lb", "--config", &file_text], directory.path().join("lb.log"));

    let announce = "log stderr all;
router id 10.78.2.2;
protocol device {}
protocol static vips { ipv4; route 203.0.113.10/32 blackhole; }
protocol bgp upstream {
  local 10.78.2.2 as 64512;
  neighbor 10.78.2.1 as 64513;
  ipv4 { import none; export where proto = \"vips\"; };
}
";
    let learn = "log stderr all;
router id 10.78.2.1;
protocol device {}
protocol kernel { ipv4 { import none; export where source = RTS_BGP; }; merge paths on; }
protocol bgp lb {
  local 10.78.2.1 as 64513;
  neighbor 10.78.2.2 as 64512;
  ipv4 { import where net ~ [ 203.0.113.0/24{32,32} ]; export none; };
}
";
    let (_router_bird, _) = bird(&router, directory.path(), "router", learn);
    let (_lb_bird, control) = bird(&lb, directory.path(), "lb", announce);
    let learnt = || run(&router, "ip route show 203.0.113.10").contains("via 10.78.2.2 dev lbs proto bird");
    eventually("the router has the route", CONVERGED, learnt);

    let to = format!("{VIP}:80").parse().unwrap();
    let connect = || client.namespace.run(|| TcpStream::connect_timeout(&to, PATIENCE)).unwrap();
    eventually("the load balancer is up", CONVERGED, || directory.path().join("state/lb.sock").exists());
    let mut talk = Talk::begin(connect().unwrap()).unwrap();
    talk.goes_on();
    assert_eq!((talk.backend.as_str(), talk.seen.ip().to_string().as_str()), ("b1", "10.78.3.1"));

    // Maintenance: withdrawn, the router knows nobody; announced again, it does.
    run(&lb, &format!("birdc -s {control} disable vips"));
    eventually("the route is withdrawn", CONVERGED, || !learnt());
    assert!(connect().is_err());
    run(&lb, &format!("birdc -s {control} enable vips"));
    eventually("the route is back", CONVERGED, learnt);
    talk.goes_on();

    drop(balancing);
    let down = edge::command_in(&lb.namespace, &["down", "--config", &file_text]);
    assert!(down.status.success(), "{}", String::from_utf8_lossy(&down.stderr));
}
