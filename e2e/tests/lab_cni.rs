//! The CNI plugin, driven by containerd.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use cirri_e2e::cni::{assert_leftovers, endpoints};
use cirri_e2e::lab::{self, Lab, eventually};
use cirri_loader::net::Namespace;
use serde_json::{Value, json};
use tempfile::TempDir;

/// containerd's namespace: with the container's name it makes the id, whose beginning names the pod.
const NAMESPACE: &str = "e2e";
/// How long a runtime may take to start a container.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long a connection may take to open.
const CONNECT: Duration = Duration::from_millis(700);

#[test]
fn a_container_of_containerd_gets_its_address_obeys_policy_and_leaves_nothing_though_the_agent_was_down() {
    let lab = Lab::up("cni", 1, &[]).unwrap();
    let manifests = format!("/run/cirri/lab/{}/nodes/node1/manifests", lab.name());
    let manifests = Path::new(&manifests);
    fs::write(manifests.join("pods.yaml"), [pod("web"), pod("client")].join("---\n")).unwrap();
    let runtime = Runtime::start(&lab);

    let web = runtime.run("web", &["/usr/sbin/nginx", "-e", "stderr", "-c", "/etc/nginx.conf"]);
    let client = runtime.run("client", &["/usr/bin/sleep", "1000"]);
    let attached = endpoints(&lab);
    let labels = |name: &str| attached.iter().find(|it| it["pod"] == pod_name(name)).map(|it| it["labels"].to_string());
    assert!(labels("web").is_some_and(|labels| labels.contains("k8s:app=web")), "{attached:?}");
    let addresses = addresses(&attached, "web");
    let inside = runtime.netns("client");
    let node = lab.netns("node:node1").unwrap();
    for address in &addresses {
        eventually("nginx answers", PATIENCE, || {
            get(&inside, *address).is_some_and(|page| page.contains("a container"))
        });
        assert!(get(&node, *address).is_some(), "the node does not reach {address}");
    }

    fs::write(manifests.join("deny.yaml"), deny("web")).unwrap();
    for address in &addresses {
        eventually("the policy holds", PATIENCE, || get(&inside, *address).is_none());
        assert!(get(&node, *address).is_some(), "its own node always reaches a workload");
    }
    fs::remove_file(manifests.join("deny.yaml")).unwrap();
    for address in &addresses {
        eventually("the policy is gone", PATIENCE, || get(&inside, *address).is_some());
    }

    lab.kill_agent("node1").unwrap();
    runtime.kill(client);
    assert!(get(&node, addresses[0]).is_some(), "another container's deletion concerned this one");
    lab.restart("node1", &[]).unwrap();
    let left = endpoints(&lab);
    assert_eq!(left.len(), 1, "{left:?}");
    assert_eq!(left[0]["pod"], pod_name("web"));
    assert_leftovers(&lab, 1);
    assert!(get(&node, addresses[0]).is_some(), "the other container did not survive the restart");

    runtime.kill(web);
    assert_eq!(endpoints(&lab), Vec::<Value>::new());
    assert_leftovers(&lab, 0);
}

fn addresses(endpoints: &[Value], name: &str) -> Vec<SocketAddr> {
    let endpoint = endpoints.iter().find(|it| it["pod"] == pod_name(name)).expect("the container has an endpoint");
    let addresses: Vec<IpAddr> = serde_json::from_value(endpoint["addresses"].clone()).unwrap();
    assert_eq!(addresses.len(), 2, "{endpoint}");
    addresses.into_iter().map(|ip| SocketAddr::new(ip, 80)).collect()
}

/// What a web server answers; nothing if it cannot be reached.
fn get(from: &Namespace, to: SocketAddr) -> Option<String> {
    let exchange = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&to, CONNECT)?;
        stream.set_read_timeout(Some(CONNECT))?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        let mut page = String::new();
        stream.read_to_string(&mut page)?;
        Ok(page)
    };
    from.run(exchange).unwrap().ok()
}

fn pod_name(name: &str) -> String {
    // Without the runtime's word for it, a pod is called by the beginning of its container's id.
    format!("{NAMESPACE}-{name}").chars().take(12).collect()
}

fn pod(name: &str) -> String {
    let called = pod_name(name);
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {called}, namespace: default, labels: {{app: {name}}}}}\n\
         spec: {{containers: [{{name: c, image: none}}]}}\n"
    )
}

fn deny(name: &str) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: deny, namespace: default}}\n\
         spec: {{podSelector: {{matchLabels: {{app: {name}}}}}, policyTypes: [Ingress]}}\n"
    )
}

/// A containerd of its own, whose containers see this machine's programs and are attached by the plugin.
struct Runtime {
    directory: TempDir,
    daemon: Child,
}

impl Runtime {
    fn start(lab: &Lab) -> Runtime {
        let directory = TempDir::new().unwrap();
        let path = |name: &str| directory.path().join(name);
        for part in ["rootfs/etc", "rootfs/usr", "rootfs/proc", "rootfs/sys", "rootfs/dev", "rootfs/tmp", "bin"] {
            fs::create_dir_all(path(part)).unwrap();
        }
        for part in ["bin", "lib", "lib64", "sbin"] {
            symlink(format!("usr/{part}"), path("rootfs").join(part)).unwrap();
        }
        fs::write(path("rootfs/etc/passwd"), "root:x:0:0:root:/:/bin/sh\n").unwrap();
        fs::write(path("rootfs/etc/group"), "root:x:0:\n").unwrap();
        fs::write(path("rootfs/etc/nginx.conf"), NGINX).unwrap();
        symlink(lab::binary().unwrap(), path("bin/cirri-cni")).unwrap();
        let network = json!({
            "cniVersion": "1.0.0", "name": "cirri",
            "plugins": [{"type": "cirri-cni", "socket": lab.socket("node1")}],
        });
        fs::write(path("10-cirri.conflist"), network.to_string()).unwrap();
        let configuration = format!(
            "version = 2\nroot = \"{0}/root\"\nstate = \"{0}/state\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\naddress = \"{0}/grpc.sock\"\n[ttrpc]\naddress = \"{0}/ttrpc.sock\"\n",
            directory.path().display()
        );
        fs::write(path("containerd.toml"), configuration).unwrap();
        let log = fs::File::create(path("containerd.log")).unwrap();
        let daemon = Command::new("containerd")
            .args(["--config".as_ref(), path("containerd.toml").as_os_str()])
            .stderr(log)
            .spawn()
            .expect("containerd starts: `cargo xtask setup` installs it");
        let runtime = Runtime { directory, daemon };
        eventually("containerd answers", PATIENCE, || runtime.ctr(&["version"]).output().unwrap().status.success());
        runtime
    }

    /// Starts a container whose client stays: it calls the plugin, ADD before and DEL after.
    fn run(&self, name: &'static str, argv: &[&str]) -> Running {
        let rootfs = self.directory.path().join("rootfs");
        let mut ctr = self.ctr(&["run", "--rm", "--cni", "--rootfs"]);
        ctr.args(["--mount", "type=bind,src=/usr,dst=/usr,options=rbind:ro"]).arg(rootfs).arg(name).args(argv);
        let child = ctr.stdin(Stdio::null()).spawn().unwrap();
        eventually("the container is attached and runs", PATIENCE, || {
            let tasks = String::from_utf8(self.ctr(&["task", "ls"]).output().unwrap().stdout).unwrap();
            tasks.lines().any(|line| line.starts_with(name) && line.contains("RUNNING"))
        });
        Running { name, client: child }
    }

    fn netns(&self, name: &str) -> Namespace {
        let tasks = String::from_utf8(self.ctr(&["task", "ls"]).output().unwrap().stdout).unwrap();
        let line = tasks.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name}: {tasks}"));
        let pid = line.split_whitespace().nth(1).unwrap();
        Namespace::open(format!("/proc/{pid}/ns/net")).unwrap()
    }

    /// Ends a container and waits until the runtime has detached and removed it.
    fn kill(&self, mut container: Running) {
        assert!(self.ctr(&["task", "kill", "-s", "KILL", container.name]).status().unwrap().success());
        container.client.wait().unwrap();
    }

    /// `ctr`, which looks for networks and plugins in fixed places: they are put there for it alone.
    fn ctr(&self, arguments: &[&str]) -> Command {
        const PLACES: &str = "mount -t tmpfs none /etc && mkdir -p /etc/cni/net.d && cp \"$0\"/10-cirri.conflist \
            /etc/cni/net.d/ && mount -t tmpfs none /opt && mkdir -p /opt/cni && ln -s \"$0\"/bin /opt/cni/bin && \
            exec ctr --address \"$0\"/grpc.sock \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", PLACES]).arg(self.directory.path());
        command.args(["--namespace", NAMESPACE]).args(arguments);
        command
    }
}

/// A container with the client that started it.
struct Running {
    name: &'static str,
    client: Child,
}

impl Drop for Runtime {
    fn drop(&mut self) {
        // What a failed test left running; a container that is not there is no trouble.
        let tasks = self.ctr(&["task", "ls", "-q"]).output().map(|output| output.stdout).unwrap_or_default();
        for name in String::from_utf8_lossy(&tasks).lines() {
            let _ = self.ctr(&["task", "kill", "-s", "KILL", name]).output();
            let _ = self.ctr(&["task", "rm", "--force", name]).output();
            let _ = self.ctr(&["container", "rm", name]).output();
        }
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// Needs nothing but its own directory.
const NGINX: &str = r#"
daemon off; master_process off; pid /tmp/nginx.pid; user root;
events {}
http {
  access_log off; client_body_temp_path /tmp/b; proxy_temp_path /tmp/p;
  fastcgi_temp_path /tmp/f; uwsgi_temp_path /tmp/u; scgi_temp_path /tmp/s;
  server { listen 80; listen [::]:80; location / { return 200 "hello from a container\n"; } }
}
"#;
