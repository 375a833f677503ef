//! The programs on the sockets of a cgroup, met by a real program. Needs root.

use std::{
    fs,
    io::{Read, Write},
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use aya::programs::links::{FdLink, PinnedLink};
use cirri_abi::{Addr, Backend, BackendState, Port, Service, ServiceKey, ServiceSlot, proto};
use cirri_e2e::kernel::{TestInstance, TestNamespace, names_in};
use cirri_loader::{LoadError, Tables, cgroup_root};

const PROGRAMS: [&str; 10] = [
    "bind4",
    "bind6",
    "connect4",
    "connect6",
    "getpeername4",
    "getpeername6",
    "recvmsg4",
    "recvmsg6",
    "sendmsg4",
    "sendmsg6",
];
const SERVICE: &str = "http://10.96.0.1/";

/// How long something that the kernel does later is waited for.
const PATIENCE: Duration = Duration::from_secs(10);

/// A cgroup that goes with its guard.
struct TestCgroup(PathBuf);

impl TestCgroup {
    fn new() -> TestCgroup {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("ldtest-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = cgroup_root().expect("a hierarchy of version 2").join(name);
        fs::create_dir(&dir).expect("the kernel tests need root");
        TestCgroup(dir)
    }
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        // A test may have removed it.
        if self.0.exists() {
            let removed = fs::remove_dir(&self.0);
            if !thread::panicking() {
                removed.expect("the cgroup of a test goes with it");
            }
        }
    }
}

/// A namespace in which somebody answers on loopback.
async fn serving() -> (TestNamespace, u16) {
    let place = TestNamespace::new();
    place.net().set_up("lo").await.expect("brought up");
    let listener = place.namespace.run(|| TcpListener::bind("127.0.0.1:0")).expect("entered").expect("bound");
    let port = listener.local_addr().expect("bound").port();
    // Ends with the process.
    thread::spawn(move || {
        for stream in listener.incoming() {
            // Whoever went away again does not need an answer. What is not read would become a reset.
            let _ = stream.and_then(|mut stream| {
                let _asked = stream.read(&mut [0; 1024])?;
                stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nhello")
            });
        }
    });
    (place, port)
}

/// Puts one backend on loopback behind the service.
fn serve(tables: &Tables, port: u16) {
    let backend = Backend {
        addr: Addr::v4([127, 0, 0, 1]),
        port: Port::new(port),
        proto: proto::TCP,
        state: BackendState::ACTIVE,
        service: 1,
        ..Backend::default()
    };
    tables.backends.put(&1, &backend).expect("written");
    tables.slots.put(&0, &ServiceSlot { backend: 1 }).expect("written");
    let key =
        ServiceKey { addr: Addr::v4([10, 96, 0, 1]), port: Port::new(80), proto: proto::TCP, ..ServiceKey::default() };
    let service = Service { id: 1, inside_count: 1, ..Service::default() };
    tables.services.put(&key, &service).expect("written");
}

/// Whether a program in the namespace, and in the cgroup if one is named, reaches the service.
fn reaches(place: &TestNamespace, cgroup: Option<&Path>) -> bool {
    let procs = cgroup.map_or("/dev/null".into(), |dir| dir.join("cgroup.procs"));
    let script = format!(
        "echo $$ > {} && exec nsenter --net={} curl --silent --max-time 10 {SERVICE}",
        procs.display(),
        place.namespace.path().display()
    );
    let done = Command::new("sh").args(["-c", &script]).output().expect("sh runs");
    let answer = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(answer.is_empty() || answer == "hello", "{answer}");
    assert_ne!(done.status.code(), Some(127), "curl must be there: {}", String::from_utf8_lossy(&done.stderr));
    done.status.success()
}

fn links(instance: &TestInstance) -> Vec<u32> {
    let dir = instance.dir().join("links");
    let id =
        |name: &String| FdLink::from(PinnedLink::from_pin(dir.join(name)).expect("pinned")).info().expect("asked").id();
    names_in(&dir).iter().map(id).collect()
}

#[tokio::test]
async fn programs_of_the_cgroup_reach_services_across_restarts_and_upgrades_until_it_is_detached() {
    let (instance, cgroup) = (TestInstance::new(), TestCgroup::new());
    let (place, port) = serving().await;
    let group = Some(cgroup.0.as_path());
    let mut datapath = instance.load();
    serve(datapath.tables(), port);
    assert!(!reaches(&place, group), "nobody translates yet");

    datapath.attach_sockets(&cgroup.0).expect("attached");
    let listed = datapath.attachments().expect("listed");
    assert_eq!(listed.iter().map(|it| it.program.as_str()).collect::<Vec<_>>(), PROGRAMS);
    assert!(reaches(&place, group));
    assert!(!reaches(&place, None), "programs elsewhere are left alone");
    drop(datapath);
    assert!(reaches(&place, group), "it outlives the process");

    let before = links(&instance);
    let mut datapath = instance.load();
    datapath.attach_sockets(&cgroup.0).expect("attached");
    assert_eq!(links(&instance), before, "the same links, with other programs");
    assert!(reaches(&place, group));
    assert_eq!(datapath.collect_links().expect("collected"), []);

    let cookie = place.namespace.cookie().expect("asked");
    datapath.tables().per_packet.put(&cookie, &1).expect("written");
    assert!(!reaches(&place, group), "the programs know the namespace by the same cookie");
    datapath.tables().per_packet.delete(&cookie).expect("deleted");
    assert!(reaches(&place, group));

    assert!(datapath.detach_sockets().expect("detached"));
    assert!(!datapath.detach_sockets().expect("detached again"));
    assert!(!reaches(&place, group));
    assert_eq!(datapath.attachments().expect("listed"), []);
}

#[tokio::test]
async fn another_cgroup_in_the_configuration_moves_the_programs() {
    let (instance, one, two) = (TestInstance::new(), TestCgroup::new(), TestCgroup::new());
    let (place, port) = serving().await;
    let mut datapath = instance.load();
    serve(datapath.tables(), port);
    datapath.attach_sockets(&one.0).expect("attached");
    datapath.attach_sockets(&two.0).expect("moved");
    assert!(reaches(&place, Some(&two.0)) && !reaches(&place, Some(&one.0)));
    assert_eq!(links(&instance).len(), PROGRAMS.len());
}

#[tokio::test]
async fn a_cgroup_that_is_gone_is_named_and_what_was_on_it_is_collected() {
    let (instance, gone, stays) = (TestInstance::new(), TestCgroup::new(), TestCgroup::new());
    let (place, port) = serving().await;
    let mut datapath = instance.load();
    serve(datapath.tables(), port);
    datapath.attach_sockets(&gone.0).expect("attached");
    fs::remove_dir(&gone.0).expect("removed");
    let error = datapath.attach_sockets(&gone.0).expect_err("must be refused");
    let named = error.to_string().contains(&*gone.0.to_string_lossy());
    assert!(matches!(error, LoadError::Cgroup { .. }) && named, "{error}");

    datapath.attach_sockets(&stays.0).expect("attached elsewhere");
    assert!(reaches(&place, Some(&stays.0)));
    fs::remove_dir(&stays.0).expect("removed");
    // The kernel lets go of a removed cgroup's programs some time later, and tells nobody.
    let mut collected = Vec::new();
    let begin = Instant::now();
    while collected.len() < PROGRAMS.len() && begin.elapsed() < PATIENCE {
        collected.extend(datapath.collect_links().expect("collected").into_iter().map(|it| it.program));
        thread::yield_now();
    }
    collected.sort();
    assert_eq!(collected, PROGRAMS);
    assert_eq!(datapath.attachments().expect("listed"), []);
}

#[tokio::test]
async fn two_instances_share_a_cgroup_and_each_takes_only_its_own_off() {
    let (one, two, cgroup) = (TestInstance::new(), TestInstance::new(), TestCgroup::new());
    let (place, port) = serving().await;
    let (mut first, mut second) = (one.load(), two.load());
    serve(second.tables(), port);
    first.attach_sockets(&cgroup.0).expect("attached");
    second.attach_sockets(&cgroup.0).expect("attached beside");
    assert!(reaches(&place, Some(&cgroup.0)));
    first.detach_sockets().expect("detached");
    assert!(reaches(&place, Some(&cgroup.0)));
    drop(two);
    assert!(!reaches(&place, Some(&cgroup.0)), "purging takes it off");
}
