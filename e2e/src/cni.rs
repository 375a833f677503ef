//! The CNI plugin, called as a runtime calls it.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use cirri_loader::net::Namespace;
use serde_json::{Value, json};

use crate::kernel::names_in;
use crate::lab::{self, Lab, printed};

/// One attachment of a container, as a runtime names it.
#[derive(Clone, Debug)]
pub struct Attachment {
    /// Name of the network.
    pub network: String,
    /// Version of the specification.
    pub version: String,
    /// The container's id.
    pub id: String,
    /// Name of the device inside.
    pub ifname: String,
    /// Path of the container's network namespace.
    pub netns: PathBuf,
    /// `CNI_ARGS`.
    pub args: String,
    /// The agent's socket.
    pub socket: String,
    /// The node's network, in which runtimes run.
    pub node: Namespace,
}

impl Attachment {
    /// `eth0` of a container at `node1` of a lab: network `cirri`, version 1.1.0.
    pub fn new(lab: &Lab, id: &str, netns: impl Into<PathBuf>) -> Attachment {
        Attachment {
            network: "cirri".to_owned(),
            version: "1.1.0".to_owned(),
            id: id.to_owned(),
            ifname: "eth0".to_owned(),
            netns: netns.into(),
            args: String::new(),
            socket: lab.socket("node1"),
            node: lab.netns("node:node1").expect("the node is there"),
        }
    }

    /// The same of another network.
    pub fn of(&self, network: &str, ifname: &str) -> Attachment {
        Attachment { network: network.to_owned(), ifname: ifname.to_owned(), ..self.clone() }
    }

    /// The plugin's answer, `null` for none; its error as JSON. `more` goes into the configuration.
    ///
    /// # Errors
    /// What the plugin said; panics if that is no JSON.
    pub fn call(&self, verb: &str, more: Value) -> Result<Value, Value> {
        answer(verb, self.start(verb, &more))
    }

    /// The code of the error that it must answer with; panics if it succeeds or says nothing.
    pub fn code(&self, verb: &str, more: Value) -> u64 {
        self.refusal(verb, more)["code"].as_u64().expect("an error has a code")
    }

    /// The error that it must answer with.
    pub fn refusal(&self, verb: &str, more: Value) -> Value {
        let error = self.call(verb, more).expect_err("the plugin must refuse");
        assert!(error["msg"].as_str().is_some_and(|text| !text.is_empty()), "{error}");
        error
    }

    /// Calls the plugin and does not wait for it.
    pub fn start(&self, verb: &str, more: &Value) -> Child {
        let mut configuration =
            json!({"cniVersion": self.version, "name": self.network, "type": "cirri-cni", "socket": self.socket});
        for (key, value) in more.as_object().expect("an object") {
            configuration[key] = value.clone();
        }
        self.feed(verb, &configuration.to_string())
    }

    /// The same with any text for a configuration.
    pub fn feed(&self, verb: &str, configuration: &str) -> Child {
        self.feed_into(Stdio::piped(), verb, configuration)
    }

    /// The same with any place for the answer.
    pub fn feed_into(&self, answer: impl Into<Stdio>, verb: &str, configuration: &str) -> Child {
        let mut plugin = Command::new(lab::binary().expect("a binary"));
        plugin.arg("cni").stdout(answer);
        self.spawn(plugin, verb, configuration)
    }

    /// What another plugin of a chain answers to ADD: one of Debian's `containernetworking-plugins`. `more` goes into
    /// its configuration.
    pub fn chained(&self, plugin: &str, more: Value) -> Value {
        let mut configuration = json!({"cniVersion": self.version, "name": self.network, "type": plugin});
        for (key, value) in more.as_object().expect("an object") {
            configuration[key] = value.clone();
        }
        let mut command = Command::new(format!("/usr/lib/cni/{plugin}"));
        // They tell what they do on standard error.
        command.stdout(Stdio::piped()).stderr(Stdio::null());
        answer(plugin, self.spawn(command, "ADD", &configuration.to_string())).expect("the other plugin does its part")
    }

    fn spawn(&self, mut plugin: Command, verb: &str, configuration: &str) -> Child {
        plugin
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", &self.id)
            .env("CNI_IFNAME", &self.ifname)
            .env("CNI_NETNS", &self.netns)
            .env("CNI_ARGS", &self.args)
            .env("CNI_PATH", "/opt/cni/bin")
            .stdin(Stdio::piped());
        let started = self.node.run(move || plugin.spawn()).expect("the node's namespace can be entered");
        let mut child = started.expect("the plugin starts");
        child.stdin.take().expect("piped").write_all(configuration.as_bytes()).expect("the plugin reads");
        child
    }
}

/// Waits for a plugin and reads what it answers.
///
/// # Errors
/// What the plugin said; panics if that is no JSON.
pub fn answer(verb: &str, plugin: Child) -> Result<Value, Value> {
    let output = plugin.wait_with_output().expect("the plugin ends");
    let answer = match output.stdout.as_slice() {
        [] => Value::Null,
        text => serde_json::from_slice(text).unwrap_or_else(|error| panic!("{verb}: {error}: {output:?}")),
    };
    if output.status.success() { Ok(answer) } else { Err(answer) }
}

/// The workloads of `node1`, as `cirri endpoint list` shows them.
pub fn endpoints(lab: &Lab) -> Vec<Value> {
    lab.ask("node1", &["endpoint", "list"]).expect("the agent answers")
}

/// Panics if something of a workload stays at `node1` beyond those that there are: devices, programs, records,
/// notes.
pub fn assert_leftovers(lab: &Lab, workloads: usize) {
    let state = state_dir(lab);
    let names = |part: &str| {
        let directory = state.join(part);
        if directory.exists() { names_in(&directory) } else { Vec::new() }
    };
    assert_eq!(names("endpoints").len(), workloads, "records");
    assert_eq!(names("deletions"), Vec::<String>::new(), "notes of deletions");
    let pins = PathBuf::from(format!("/sys/fs/bpf/cirri/lab-{}-node1", lab.name()));
    let kept = pins.join("endpoints");
    let kept = if kept.exists() { names_in(&kept) } else { Vec::new() };
    assert_eq!(kept.len(), workloads, "records in the kernel: {kept:?}");
    let links = names_in(&pins.join("links"));
    let of_workloads = links.iter().filter(|name| name.contains("workload")).count();
    assert_eq!(of_workloads, 2 * workloads, "programs: {links:?}");
    let node = lab.netns("node:node1").expect("the node is there");
    let devices = printed(&node, &["ip", "-o", "link", "show", "type", "veth"]);
    assert_eq!(devices.matches("alias cirri ").count(), workloads, "devices: {devices}");
}

/// The state directory of `node1`'s agent.
pub fn state_dir(lab: &Lab) -> PathBuf {
    PathBuf::from(format!("/run/cirri/lab/{}/nodes/node1/state", lab.name()))
}
