//! A real etcd on loopback, and a cable to it that can be cut.

use std::{
    net::TcpListener as StdListener,
    process::{Child, Command, Stdio},
    time::Duration,
};

use cirri_store::{Etcd, EtcdOptions, Event, EventStream, Store};
use futures::StreamExt;
use tempfile::TempDir;
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
};

/// One member, with a data directory of its own that survives [`Server::kill`].
pub struct Server {
    dir: TempDir,
    name: String,
    client: String,
    peer: String,
    /// All members: `<name>=<peer URL>,…`
    cluster: String,
    child: Option<Child>,
}

impl Server {
    pub async fn start() -> Server {
        let mut members = Server::cluster(1).await;
        members.remove(0)
    }

    pub async fn cluster(size: usize) -> Vec<Server> {
        let mut members: Vec<Server> = (0..size)
            .map(|number| Server {
                dir: tempfile::tempdir().expect("a directory for etcd's data"),
                name: format!("m{number}"),
                client: format!("http://127.0.0.1:{}", free_port()),
                peer: format!("http://127.0.0.1:{}", free_port()),
                cluster: String::new(),
                child: None,
            })
            .collect();
        let names: Vec<String> = members.iter().map(|member| format!("{}={}", member.name, member.peer)).collect();
        for member in &mut members {
            member.cluster = names.join(",");
            member.spawn();
        }
        for member in &members {
            member.ready().await;
        }
        members
    }

    pub fn endpoint(&self) -> &str {
        &self.client
    }

    pub fn port(&self) -> u16 {
        let (_, port) = self.client.rsplit_once(':').expect("a port");
        port.parse().expect("a number")
    }

    /// SIGKILL: no chance to tidy up.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("kill etcd");
            child.wait().expect("wait for etcd");
        }
    }

    /// Its data directory is gone; it must not run.
    pub fn lose_data(&self) {
        std::fs::remove_dir_all(self.dir.path().join("data")).expect("data");
    }

    /// On the same data, and until it answers.
    pub async fn restart(&mut self) {
        self.spawn();
        self.ready().await;
    }

    pub fn spawn(&mut self) {
        let child = Command::new("etcd")
            .arg("--data-dir")
            .arg(self.dir.path().join("data"))
            .args(["--name", &self.name, "--logger", "zap", "--log-level", "error"])
            .args(["--listen-client-urls", &self.client])
            .args(["--advertise-client-urls", &self.client])
            .args(["--listen-peer-urls", &self.peer])
            .args(["--initial-advertise-peer-urls", &self.peer])
            .args(["--initial-cluster", &self.cluster])
            .args(["--initial-cluster-token", &self.cluster])
            .args(["--experimental-watch-progress-notify-interval", "300ms"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        self.child =
            Some(child.unwrap_or_else(|error| {
                panic!("cannot start etcd ({error}): run `cargo xtask setup`, it installs it")
            }));
    }

    pub async fn ready(&self) {
        let options = EtcdOptions { request_timeout: Duration::from_secs(30), ..EtcdOptions::new([&self.client]) };
        let client = Etcd::new(&options).expect("options");
        client.list("ready").await.expect("etcd comes up");
    }

    pub fn client(&self) -> Etcd {
        connect([self.endpoint()])
    }

    pub fn etcdctl(&self, arguments: &[&str]) -> String {
        let output = Command::new("etcdctl")
            .env("ETCDCTL_API", "3")
            .args(["--endpoints", &self.client])
            .args(arguments)
            .output()
            .unwrap_or_else(|error| panic!("cannot start etcdctl ({error}): run `cargo xtask setup`, it installs it"));
        assert!(output.status.success(), "etcdctl {arguments:?}: {output:?}");
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    /// The leases etcd knows, as etcdctl prints them.
    pub fn leases(&self) -> Vec<String> {
        let text = self.etcdctl(&["lease", "list"]);
        text.lines().skip(1).map(str::to_owned).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A client with a short lease: two seconds are etcd's least.
pub fn connect<'a>(endpoints: impl IntoIterator<Item = &'a str>) -> Etcd {
    let options = EtcdOptions { lease_ttl: Duration::from_secs(2), ..EtcdOptions::new(endpoints) };
    Etcd::new(&options).expect("options")
}

/// A TCP relay to a server.
pub struct Cable {
    port: u16,
    whole: watch::Sender<bool>,
}

impl Cable {
    pub async fn to(port: u16) -> Cable {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let cable = Cable { port: listener.local_addr().expect("an address").port(), whole: watch::Sender::new(true) };
        let whole = cable.whole.subscribe();
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                tokio::spawn(relay(near, port, whole.clone()));
            }
        });
        cable
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Ends what goes through it, and lets nothing new through.
    pub fn cut(&self) {
        self.whole.send_replace(false);
    }

    pub fn mend(&self) {
        self.whole.send_replace(true);
    }
}

async fn relay(mut near: TcpStream, port: u16, mut whole: watch::Receiver<bool>) {
    if !*whole.borrow() {
        return;
    }
    let Ok(mut far) = TcpStream::connect(("127.0.0.1", port)).await else {
        return;
    };
    // However it ends, both sides are closed: that is all the tests ask of it.
    tokio::select! {
        _ = copy_bidirectional(&mut near, &mut far) => {}
        _ = whole.wait_for(|whole| !whole) => {}
    }
}

/// The next event; no test waits longer than this.
pub async fn next(watch: &mut EventStream) -> Event {
    let event = tokio::time::timeout(Duration::from_secs(30), watch.next()).await;
    event.expect("an event within 30 s").expect("a watch never ends")
}

/// The next event that is no progress.
pub async fn next_change(watch: &mut EventStream) -> Event {
    loop {
        match next(watch).await {
            Event::Progress(_) => {}
            change => return change,
        }
    }
}

fn free_port() -> u16 {
    let listener = StdListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address").port()
}
