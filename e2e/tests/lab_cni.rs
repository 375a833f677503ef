//! The CNI plugin: driven by a real container runtime, and by hand, verb by verb.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use cirri_e2e::kernel::{TestNamespace, names_in};
use cirri_e2e::lab::{self, Lab, eventually, printed};
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
    let endpoints = endpoints(&lab);
    let labels =
        |name: &str| endpoints.iter().find(|it| it["pod"] == pod_name(name)).map(|it| it["labels"].to_string());
    assert!(labels("web").is_some_and(|labels| labels.contains("k8s:app=web")), "{endpoints:?}");
    let addresses = addresses(&endpoints, "web");
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
    let left = self::endpoints(&lab);
    assert_eq!(left.len(), 1, "{left:?}");
    assert_eq!(left[0]["pod"], pod_name("web"));
    assert_leftovers(&lab, 1);
    assert!(get(&node, addresses[0]).is_some(), "the other container did not survive the restart");

    runtime.kill(web);
    assert_eq!(self::endpoints(&lab), Vec::<Value>::new());
    assert_leftovers(&lab, 0);
}

#[test]
fn every_verb_answers_as_the_specification_says() {
    let lab = Lab::up("verbs", 1, &[]).unwrap();
    let place = TestNamespace::new();
    let container = Container { lab: &lab, id: "by-hand", netns: place.namespace.path().to_owned() };

    let versions = container.call("VERSION", json!({"cniVersion": "1.1.0"})).unwrap();
    assert_eq!(versions["cniVersion"], "1.1.0");
    assert!(versions["supportedVersions"].as_array().unwrap().contains(&json!("1.0.0")), "{versions}");
    assert_eq!(container.call("STATUS", json!({})), Ok(Value::Null));

    let added = container.call("ADD", json!({})).unwrap();
    let ips: Vec<&str> = added["ips"].as_array().unwrap().iter().map(|ip| ip["address"].as_str().unwrap()).collect();
    assert_eq!(ips.len(), 2, "{added}");
    assert!(ips[0].ends_with("/32") && ips[1].ends_with("/128"), "{ips:?}");
    assert_eq!(added["interfaces"][1]["name"], "eth0");
    assert_eq!(added["interfaces"][1]["sandbox"], container.netns.to_str().unwrap());
    let shown = printed(&place.namespace, &["ip", "-o", "addr", "show", "dev", "eth0"]);
    assert!(ips.iter().all(|ip| shown.contains(ip.split('/').next().unwrap())), "{shown}");
    assert_eq!(container.call("ADD", json!({})).unwrap()["ips"], added["ips"], "asked again, it is the same");

    let previous = json!({"prevResult": added});
    assert_eq!(container.call("CHECK", previous.clone()), Ok(Value::Null));
    let mut other = added.clone();
    other["ips"][0]["address"] = json!("10.9.9.9/32");
    assert_eq!(container.code("CHECK", json!({"prevResult": other})), 101);

    for _ in 0..2 {
        assert_eq!(container.call("DEL", previous.clone()), Ok(Value::Null), "DEL succeeds however often");
    }
    assert_eq!(container.code("CHECK", previous), 3);
    assert_leftovers(&lab, 0);

    let kept = TestNamespace::new();
    let kept = Container { lab: &lab, id: "kept", netns: kept.namespace.path().to_owned() };
    container.call("ADD", json!({})).unwrap();
    kept.call("ADD", json!({})).unwrap();
    let valid = json!({"cni.dev/valid-attachments": [{"containerID": "kept", "ifname": "eth0"}]});
    assert_eq!(container.call("GC", valid), Ok(Value::Null));
    let left = endpoints(&lab);
    assert_eq!((left.len(), &left[0]["container_id"]), (1, &json!("kept")), "{left:?}");
    assert_leftovers(&lab, 1);

    assert_eq!(container.code("GC", json!({})), 7, "a GC that names nothing must not remove everything");
    assert_eq!(container.code("ADD", json!({"cniVersion": "9.0.0"})), 1);
    assert_eq!(container.code("FETCH", json!({})), 4);
    assert_eq!(container.fed("ADD", "{").unwrap_err()["code"], 6);
    let nowhere = Container { netns: "/run/netns/nowhere".into(), id: "nowhere", lab: &lab };
    assert!(nowhere.call("ADD", json!({})).is_err());
    assert_leftovers(&lab, 1);

    lab.kill_agent("node1").unwrap();
    assert_eq!(container.code("ADD", json!({})), 11, "the runtime tries again later");
    assert_eq!(container.code("STATUS", json!({})), 50);
    assert_eq!(kept.call("DEL", json!({})), Ok(Value::Null), "DEL works while the agent is down");
    lab.restart("node1", &[]).unwrap();
    assert_eq!(endpoints(&lab), Vec::<Value>::new());
    assert_leftovers(&lab, 0);
}

/// Nothing of a workload stays beyond those that there are: devices, programs, records, notes.
fn assert_leftovers(lab: &Lab, workloads: usize) {
    let state = PathBuf::from(format!("/run/cirri/lab/{}/nodes/node1/state", lab.name()));
    assert_eq!(names_in(&state.join("endpoints")).len(), workloads, "records");
    if state.join("deletions").exists() {
        assert_eq!(names_in(&state.join("deletions")), Vec::<String>::new(), "notes of deletions");
    }
    let links = names_in(Path::new(&format!("/sys/fs/bpf/cirri/lab-{}-node1/links", lab.name())));
    let of_workloads = links.iter().filter(|name| name.contains("workload")).count();
    assert_eq!(of_workloads, 2 * workloads, "programs: {links:?}");
    let node = lab.netns("node:node1").unwrap();
    let devices = printed(&node, &["ip", "-o", "link"]);
    assert_eq!(devices.matches("lxc").count(), workloads, "devices: {devices}");
}

fn endpoints(lab: &Lab) -> Vec<Value> {
    lab.ask("node1", &["endpoint", "list"]).unwrap()
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

/// A container that exists for the plugin alone.
struct Container<'a> {
    lab: &'a Lab,
    id: &'a str,
    netns: PathBuf,
}

impl Container<'_> {
    /// The plugin's answer, `null` for none; its error as JSON.
    fn call(&self, verb: &str, more: Value) -> Result<Value, Value> {
        let mut configuration = json!({
            "cniVersion": "1.1.0", "name": "cirri", "type": "cirri-cni", "socket": self.lab.socket("node1"),
        });
        for (key, value) in more.as_object().unwrap() {
            configuration[key] = value.clone();
        }
        self.fed(verb, &configuration.to_string())
    }

    /// The code of the error that it must answer with.
    fn code(&self, verb: &str, more: Value) -> u64 {
        let error = self.call(verb, more).expect_err("the plugin must refuse");
        assert!(error["msg"].as_str().is_some_and(|text| !text.is_empty()), "{error}");
        error["code"].as_u64().unwrap_or_else(|| panic!("no code: {error}"))
    }

    fn fed(&self, verb: &str, input: &str) -> Result<Value, Value> {
        let mut child = Command::new(lab::binary().unwrap())
            .arg("cni")
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", self.id)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_NETNS", &self.netns)
            .env("CNI_PATH", "/opt/cni/bin")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let answer = match output.stdout.as_slice() {
            [] => Value::Null,
            text => serde_json::from_slice(text).unwrap_or_else(|error| panic!("{verb}: {error}: {output:?}")),
        };
        if output.status.success() { Ok(answer) } else { Err(answer) }
    }
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
