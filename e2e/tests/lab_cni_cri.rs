//! The CNI plugin, driven by containerd's CRI, as a kubelet drives it.

use std::fs;
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use cirri_e2e::cni::{assert_leftovers, endpoints, state_dir};
use cirri_e2e::lab::{self, Lab, eventually, printed};
use serde_json::json;
use tempfile::TempDir;
use tonic::transport::{Channel, Endpoint};

/// How long containerd may take to come up.
const PATIENCE: Duration = Duration::from_secs(60);
/// The image of a sandbox; it is made here.
const IMAGE: &str = "cirri.test/pause:1";

#[test]
fn a_sandbox_of_cri_is_its_pod_and_leaves_nothing() {
    let lab = Lab::up("cri", 1, &[]).unwrap();
    fs::write(state_dir(&lab).with_file_name("manifests").join("pods.yaml"), PODS).unwrap();
    let runtime = Containerd::start(&lab);
    let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio.block_on(async {
        let cri = Cri::connect(&runtime.directory.path().join("grpc.sock")).await;
        let web = cri.run("shop", "web").await.expect("a sandbox");
        let there = endpoints(&lab);
        assert_eq!(there.len(), 1, "{there:?}");
        assert_eq!((&there[0]["namespace"], &there[0]["pod"]), (&json!("shop"), &json!("web")));
        assert!(there[0]["labels"].to_string().contains("k8s:app=web"), "{there:?}");
        let addresses = cri.addresses(&web).await;
        assert_eq!(json!(addresses), there[0]["addresses"], "CRI knows what it was given, both families");
        for address in &addresses {
            printed(&lab.netns("node:node1").unwrap(), &["ping", "-c", "1", "-W", "5", address]);
        }

        // The agent is away: containerd says so and takes the sandbox down again.
        lab.kill_agent("node1").unwrap();
        let error = cri.run("shop", "late").await.expect_err("no agent").to_string();
        assert!(error.contains("no agent listens"), "{error}");
        cri.stop(&web).await;
        lab.restart("node1", &[]).unwrap();
        assert_leftovers(&lab, 0);
        let late = cri.run("shop", "late").await.expect("a sandbox");
        assert_eq!(endpoints(&lab)[0]["pod"], "late");
        cri.stop(&late).await;
        assert_leftovers(&lab, 0);
    });
}

const PODS: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {containers: [{name: c, image: none}]}
---
apiVersion: v1
kind: Pod
metadata: {name: late, namespace: shop, labels: {app: late}}
spec: {containers: [{name: c, image: none}]}
";

/// A containerd of its own with the CRI plugin, and the image of a sandbox.
struct Containerd {
    directory: TempDir,
    daemon: Child,
}

impl Containerd {
    fn start(lab: &Lab) -> Containerd {
        let directory = TempDir::new().unwrap();
        let path = |name: &str| directory.path().join(name);
        for part in ["bin", "net.d", "image/usr/bin"] {
            fs::create_dir_all(path(part)).unwrap();
        }
        std::os::unix::fs::symlink(lab::binary().unwrap(), path("bin/cirri-cni")).unwrap();
        // containerd brings `lo` up by a plugin of its own before it asks for networks.
        std::os::unix::fs::symlink("/usr/lib/cni/loopback", path("bin/loopback")).unwrap();
        let plugin = json!({"type": "cirri-cni", "socket": lab.socket("node1")});
        let list = json!({"cniVersion": "1.0.0", "name": "cirri", "plugins": [plugin]});
        fs::write(path("net.d/10-cirri.conflist"), list.to_string()).unwrap();
        let configuration = format!(
            "version = 2\nroot = \"{0}/root\"\nstate = \"{0}/state\"\n\
             [grpc]\naddress = \"{0}/grpc.sock\"\n[ttrpc]\naddress = \"{0}/ttrpc.sock\"\n\
             [plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = \"{IMAGE}\"\nrestrict_oom_score_adj = true\n\
             stream_server_address = \"127.0.0.1\"\nstream_server_port = \"0\"\n\
             [plugins.\"io.containerd.grpc.v1.cri\".containerd]\nsnapshotter = \"native\"\n\
             [plugins.\"io.containerd.grpc.v1.cri\".cni]\nbin_dir = \"{0}/bin\"\nconf_dir = \"{0}/net.d\"\n",
            directory.path().display()
        );
        fs::write(path("containerd.toml"), configuration).unwrap();
        make_image(directory.path());
        let log = fs::File::create(path("containerd.log")).unwrap();
        let mut command = Command::new("containerd");
        command.args(["--config".as_ref(), path("containerd.toml").as_os_str()]).stderr(log);
        let started = lab.netns("node:node1").unwrap().run(move || command.spawn()).unwrap();
        let daemon = started.expect("containerd starts: `cargo xtask setup` installs it");
        let runtime = Containerd { directory, daemon };
        let ctr = |arguments: &[&str]| {
            let socket = runtime.directory.path().join("grpc.sock");
            let mut command = Command::new("ctr");
            command.arg("--address").arg(socket).args(["--namespace", "k8s.io"]).args(arguments);
            command.output().unwrap()
        };
        eventually("containerd answers", PATIENCE, || ctr(&["version"]).status.success());
        let archive = runtime.directory.path().join("image.tar");
        let imported = ctr(&["images", "import", "--snapshotter", "native", archive.to_str().unwrap()]);
        assert!(imported.status.success(), "{imported:?}");
        runtime
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// An image of one layer that sleeps, as `docker save` writes it.
fn make_image(directory: &Path) {
    const MAKE: &str = r#"
        set -e; cd "$0"
        for file in /usr/bin/sleep $(ldd /usr/bin/sleep | grep -o '/[^ ]*'); do
            mkdir -p "image$(dirname "$file")"; cp -L "$file" "image$file"
        done
        mkdir archive; tar -C image -cf archive/layer.tar .
        layer=$(sha256sum < archive/layer.tar | cut -d' ' -f1)
        printf '{"architecture":"%s","os":"linux","config":{"Entrypoint":["/usr/bin/sleep","100000"]},
            "rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}' "$2" "$layer" > archive/config.json
        printf '[{"Config":"config.json","RepoTags":["%s"],"Layers":["layer.tar"]}]' "$1" > archive/manifest.json
        tar -C archive -cf image.tar manifest.json config.json layer.tar"#;
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let made = Command::new("sh").args(["-c", MAKE]).arg(directory).args([IMAGE, architecture]).output().unwrap();
    assert!(made.status.success(), "{made:?}");
}

/// What of `runtime.v1` a kubelet needs for a sandbox.
struct Cri(Channel);

impl Cri {
    async fn connect(socket: &Path) -> Cri {
        let endpoint = Endpoint::from_shared(format!("unix:{}", socket.display())).unwrap();
        Cri(endpoint.connect().await.expect("containerd listens"))
    }

    async fn run(&self, namespace: &str, name: &str) -> Result<String, tonic::Status> {
        let metadata =
            Metadata { name: name.into(), uid: format!("uid-{name}"), namespace: namespace.into(), attempt: 0 };
        let config = SandboxConfig { metadata: Some(metadata), linux: Some(Linux {}) };
        let answer: Sandbox = self.ask("RunPodSandbox", RunSandbox { config: Some(config) }).await?;
        Ok(answer.id)
    }

    async fn addresses(&self, id: &str) -> Vec<String> {
        let answer: StatusAnswer = self.ask("PodSandboxStatus", Sandbox { id: id.into() }).await.unwrap();
        let network = answer.status.and_then(|status| status.network).expect("a sandbox has a network");
        std::iter::once(network.ip).chain(network.additional.into_iter().map(|more| more.ip)).collect()
    }

    async fn stop(&self, id: &str) {
        for method in ["StopPodSandbox", "RemovePodSandbox"] {
            let _: Nothing = self.ask(method, Sandbox { id: id.into() }).await.unwrap();
        }
    }

    async fn ask<Q, A>(&self, method: &str, question: Q) -> Result<A, tonic::Status>
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        let mut client = tonic::client::Grpc::new(self.0.clone());
        client.ready().await.map_err(|error| tonic::Status::unavailable(error.to_string()))?;
        let path = format!("/runtime.v1.RuntimeService/{method}").parse().unwrap();
        let codec = tonic_prost::ProstCodec::<Q, A>::default();
        client.unary(tonic::Request::new(question), path, codec).await.map(tonic::Response::into_inner)
    }
}

#[derive(Clone, PartialEq, prost::Message)]
struct Metadata {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    uid: String,
    #[prost(string, tag = "3")]
    namespace: String,
    #[prost(uint32, tag = "4")]
    attempt: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Linux {}

#[derive(Clone, PartialEq, prost::Message)]
struct SandboxConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<Metadata>,
    #[prost(message, optional, tag = "8")]
    linux: Option<Linux>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RunSandbox {
    #[prost(message, optional, tag = "1")]
    config: Option<SandboxConfig>,
}

/// Both an answer to `RunPodSandbox` and the question of the others.
#[derive(Clone, PartialEq, prost::Message)]
struct Sandbox {
    #[prost(string, tag = "1")]
    id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct StatusAnswer {
    #[prost(message, optional, tag = "1")]
    status: Option<SandboxStatus>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct SandboxStatus {
    #[prost(message, optional, tag = "5")]
    network: Option<Network>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Network {
    #[prost(string, tag = "1")]
    ip: String,
    #[prost(message, repeated, tag = "2")]
    additional: Vec<Ip>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Ip {
    #[prost(string, tag = "1")]
    ip: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Nothing {}
