//! The CNI plugin, driven by podman: two networks on one container, addresses asked for.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::{Command, Output};

use cirri_e2e::cni::{assert_leftovers, endpoints};
use cirri_e2e::lab::{self, Lab, printed};
use cirri_loader::net::Namespace;
use serde_json::json;
use tempfile::TempDir;

#[test]
fn a_container_of_podman_has_two_networks_the_addresses_it_asks_for_and_one_default_route() {
    let lab = Lab::up("podman", 1, &[]).unwrap();
    let podman = Podman::new(&lab);
    // What the node gives by itself shows its ranges.
    podman.run("first", &["--network", "blue"]);
    let given = podman.addresses("first")[0].clone();
    let own = |last: &str| format!("{}.{last}", given.rsplit_once('.').unwrap().0);
    let mac = "02:00:5e:00:53:01";

    let networks = [format!("blue:ip={}", own("77")), format!("green:ip={},mac={mac}", own("78"))];
    podman.run("web", &["--network", &networks[0], "--network", &networks[1]]);
    let inside = podman.netns("web");
    let shown = printed(&inside, &["ip", "-o", "addr"]);
    assert!(shown.contains(&own("77")) && shown.contains(&own("78")), "{shown}");
    assert!(printed(&inside, &["ip", "link"]).contains(mac));
    let mut addresses = podman.addresses("web");
    addresses.sort();
    assert_eq!(addresses, [own("77"), own("78")], "podman knows what it was given");
    let one_default = || {
        for family in ["-4", "-6"] {
            let routes = printed(&inside, &["ip", family, "route", "show", "default"]);
            assert_eq!(routes.lines().count(), 1, "ip {family}: {routes}");
        }
        let node = lab.node("node1").unwrap();
        printed(&inside, &["ping", "-c", "1", "-W", "5", &node.addresses[0].to_string()]);
    };
    one_default();
    for address in &addresses {
        printed(&lab.netns("node:node1").unwrap(), &["ping", "-c", "1", "-W", "5", address]);
    }

    // In podman's own words, whichever of the two it attached first.
    for network in ["green", "blue"] {
        podman.ok(&["network", "disconnect", network, "web"]);
        one_default();
        podman.ok(&["network", "connect", network, "web"]);
        one_default();
    }

    let refused = |name: &str, options: &[&str], says: &str| {
        let output = podman.try_run(name, options);
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && told.contains(says), "{says}: {told}");
        podman.ok(&["rm", "-f", "-t", "0", name]);
    };
    refused("taken", &["--network", "blue", "--ip", &given], "in use by default/first");
    refused("outside", &["--network", "blue", "--ip", "192.0.2.7"], "in none of this node's ranges");
    refused("no_pod", &["--network", "blue"], "K8S_POD_NAME `no_pod` is not a DNS subdomain");

    // The agent is away when podman removes them.
    lab.kill_agent("node1").unwrap();
    podman.ok(&["rm", "-f", "-t", "0", "web"]);
    lab.restart("node1", &[]).unwrap();
    let left = endpoints(&lab);
    assert_eq!((left.len(), &left[0]["pod"]), (1, &json!("first")), "{left:?}");
    podman.ok(&["rm", "-f", "-t", "0", "first"]);
    assert_leftovers(&lab, 0);
}

/// podman with its own state, two networks of the plugin's, and this machine's programs in its containers.
struct Podman {
    directory: TempDir,
    node: Namespace,
}

impl Podman {
    fn new(lab: &Lab) -> Podman {
        let directory = TempDir::new().unwrap();
        let path = |name: &str| directory.path().join(name);
        for part in ["bin", "net.d", "rootfs/etc", "rootfs/usr", "rootfs/proc", "rootfs/sys", "rootfs/dev"] {
            fs::create_dir_all(path(part)).unwrap();
        }
        for part in ["bin", "lib", "lib64", "sbin"] {
            symlink(format!("usr/{part}"), path("rootfs").join(part)).unwrap();
        }
        symlink(lab::binary().unwrap(), path("bin/cirri-cni")).unwrap();
        for network in ["blue", "green"] {
            let plugin = json!({
                "type": "cirri-cni", "socket": lab.socket("node1"), "capabilities": {"ips": true, "mac": true},
            });
            let list = json!({"cniVersion": "1.0.0", "name": network, "plugins": [plugin]});
            fs::write(path(&format!("net.d/{network}.conflist")), list.to_string()).unwrap();
        }
        let configuration = format!(
            "[network]\nnetwork_backend=\"cni\"\ncni_plugin_dirs=[\"{0}/bin\"]\nnetwork_config_dir=\"{0}/net.d\"\n\
             default_network=\"blue\"\n[engine]\ncgroup_manager=\"cgroupfs\"\nevents_logger=\"file\"\nruntime=\"runc\"\n\
             [containers]\ndefault_ulimits=[\"nofile=1024:1024\",\"nproc=4096:4096\"]\n",
            directory.path().display()
        );
        fs::write(path("containers.conf"), configuration).unwrap();
        Podman { directory, node: lab.netns("node:node1").unwrap() }
    }

    fn run(&self, name: &str, options: &[&str]) {
        let output = self.try_run(name, options);
        assert!(output.status.success(), "{name}: {output:?}");
    }

    fn try_run(&self, name: &str, options: &[&str]) -> Output {
        let rootfs = self.directory.path().join("rootfs");
        let mut arguments = vec!["run", "-d", "--name", name, "--security-opt", "seccomp=unconfined"];
        arguments.extend(["-v", "/usr:/usr:ro"]);
        arguments.extend(options);
        arguments.extend(["--rootfs", rootfs.to_str().unwrap(), "/usr/bin/sleep", "1000"]);
        self.call(&arguments)
    }

    /// The IPv4 addresses that podman says a container has.
    fn addresses(&self, name: &str) -> Vec<String> {
        let format = "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{end}}";
        self.ok(&["inspect", "-f", format, name]).split_whitespace().map(str::to_owned).collect()
    }

    fn netns(&self, name: &str) -> Namespace {
        let pid = self.ok(&["inspect", "-f", "{{.State.Pid}}", name]);
        Namespace::open(format!("/proc/{}/ns/net", pid.trim())).unwrap()
    }

    fn ok(&self, arguments: &[&str]) -> String {
        let output = self.call(arguments);
        assert!(output.status.success(), "podman {arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn call(&self, arguments: &[&str]) -> Output {
        let path = |name: &str| self.directory.path().join(name);
        let mut command = Command::new("podman");
        command.env("CONTAINERS_CONF", path("containers.conf"));
        for place in ["root", "runroot", "tmpdir"] {
            command.arg(format!("--{place}")).arg(path(place));
        }
        command.args(["--storage-driver", "vfs", "--network-config-dir"]).arg(path("net.d")).args(arguments);
        let output = self.node.run(move || command.output()).expect("the node's namespace can be entered");
        output.expect("podman starts: `cargo xtask setup` installs it")
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        // What a failed test left running. Nothing is there after one that passed.
        let _ = self.call(&["rm", "-f", "-t", "0", "-a"]);
        let _ = Command::new("umount").arg("-l").arg(self.directory.path().join("root/vfs")).output();
    }
}
