//! `cirri lab exec` and `cirri lab logs`: looking into a pod.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::mem::MaybeUninit;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};
use rustix::fs::inotify;

use super::cgroup;
use super::netns;
use super::process;
use super::state::{DEFAULT_NAME, ECHO_PROGRAM, Lab, LabName, PodKey};
use crate::output;

/// The shells' exit code for a program that is not there.
const EXIT_NOT_FOUND: u8 = 127;

/// Arguments of `cirri lab exec`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  cirri lab exec shop/client -- curl -s http://10.244.1.3
  cirri lab exec client -n shop -- ip addr
  cirri lab exec --node node1 -- ip route
  cirri lab exec --world -- curl -s http://172.31.255.11:8080")]
pub struct ExecArgs {
    /// The lab.
    #[arg(long, default_value = DEFAULT_NAME)]
    name: LabName,
    /// The pod, as POD or NAMESPACE/POD.
    #[arg(required_unless_present_any = ["node", "world"])]
    pod: Option<String>,
    /// The pod's namespace.
    #[arg(short, long)]
    namespace: Option<String>,
    /// A node instead of a pod.
    #[arg(long, conflicts_with_all = ["pod", "namespace", "world"])]
    node: Option<String>,
    /// The outside host instead of a pod.
    #[arg(long, conflicts_with_all = ["pod", "namespace"])]
    world: bool,
    /// The program and its arguments.
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// Arguments of `cirri lab logs`.
#[derive(Debug, clap::Args)]
pub struct LogsArgs {
    /// The lab.
    #[arg(long, default_value = DEFAULT_NAME)]
    name: LabName,
    /// The pod, as POD or NAMESPACE/POD.
    pod: String,
    /// The pod's namespace.
    #[arg(short, long)]
    namespace: Option<String>,
    /// One container instead of all.
    #[arg(short, long)]
    container: Option<String>,
    /// Go on until the pod is gone or this is interrupted.
    #[arg(short, long)]
    follow: bool,
}

/// Becomes the program, inside the namespace asked for.
///
/// # Errors
/// No such pod or node, or the program cannot be started.
pub fn run(args: ExecArgs) -> anyhow::Result<ExitCode> {
    let lab = Lab::load(&args.name)?;
    let (program, arguments) = args.command.split_first().context("which program?")?;
    let mut command = Command::new(program);
    command.args(arguments);
    let (netns, group) = if let Some(name) = &args.node {
        (lab.node(name)?.netns.clone(), cgroup::of(&lab.name, name)?)
    } else if args.world {
        (netns::path(&lab.name.world_namespace()), cgroup::of(&lab.name, "world")?)
    } else {
        let pod = lab.pod(&pod_key(args.pod.as_deref().unwrap_or_default(), args.namespace.as_deref())?)?;
        command.env("HOSTNAME", &pod.key.name);
        if let Some(container) = pod.spec.containers.first() {
            command.envs(&container.env);
        }
        let group = cgroup::of_pod(&lab.name, &pod)?;
        (pod.netns, group)
    };
    cgroup::add(&group)?;
    cgroup::enter(&group)?;
    // Returns only if it fails: the program takes this process over, terminal, signals and exit code included.
    let error = netns::within(&netns, || command.exec())?;
    if error.kind() == io::ErrorKind::NotFound {
        let path = std::env::var_os("PATH").unwrap_or_default();
        output::complain(&process::not_found(program, Path::new("."), &path));
        return Ok(ExitCode::from(EXIT_NOT_FOUND));
    }
    Err(error).with_context(|| format!("cannot start {program}"))
}

/// Prints what a pod's programs wrote.
///
/// # Errors
/// No such pod or container.
pub fn logs(args: LogsArgs) -> anyhow::Result<ExitCode> {
    let lab = Lab::load(&args.name)?;
    let pod = lab.pod(&pod_key(&args.pod, args.namespace.as_deref())?)?;
    let programs = pod.spec.program_names();
    let chosen: Vec<&String> = match &args.container {
        None => programs.iter().collect(),
        Some(name) => {
            let echo = pod.spec.containers.iter().any(|container| container.name == *name && container.is_echo());
            let program = if echo { ECHO_PROGRAM } else { name.as_str() };
            let found: Vec<&String> = programs.iter().filter(|known| *known == program).collect();
            if found.is_empty() {
                let names: Vec<&str> =
                    pod.spec.containers.iter().filter(|c| c.runs()).map(|c| c.name.as_str()).collect();
                bail!("pod {} has no container {name} with a program; it has {}", pod.key, names.join(", "));
            }
            found
        }
    };
    let directory = lab.pod_directory(&pod.key);
    let mut files: Vec<Tail> = chosen
        .iter()
        .map(|name| Tail {
            label: (chosen.len() > 1).then(|| name.to_string()),
            path: directory.join(format!("{name}.log")),
            read: 0,
        })
        .collect();
    // Watched before the first look: what is written in between is then not missed.
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC)?;
    inotify::add_watch(&watch, &directory, inotify::WatchFlags::MODIFY | inotify::WatchFlags::DELETE_SELF)?;
    let mut space = [MaybeUninit::uninit(); 4096];
    let mut events = inotify::Reader::new(&watch, &mut space);
    loop {
        for file in &mut files {
            file.print_news()?;
        }
        if !args.follow {
            return Ok(ExitCode::SUCCESS);
        }
        match events.next() {
            Ok(event) if event.events().intersects(inotify::ReadFlags::DELETE_SELF | inotify::ReadFlags::IGNORED) => {
                return Ok(ExitCode::SUCCESS);
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot follow the log"),
        }
    }
}

/// A log and how far it was printed.
struct Tail {
    /// What to put before its parts when there are several logs.
    label: Option<String>,
    path: PathBuf,
    read: u64,
}

impl Tail {
    fn print_news(&mut self) -> anyhow::Result<()> {
        // Gone with its pod: the watch ends the loop.
        let Ok(mut file) = File::open(&self.path) else { return Ok(()) };
        file.seek(SeekFrom::Start(self.read))?;
        let mut news = Vec::new();
        self.read += u64::try_from(file.read_to_end(&mut news)?)?;
        if let Some(label) = self.label.as_ref().filter(|_| !news.is_empty()) {
            output::write_out(&format!("==> {label}\n"))?;
        }
        Ok(output::write_bytes(&news)?)
    }
}

/// A pod named as `POD`, `NAMESPACE/POD`, or `POD` with `-n NAMESPACE`.
fn pod_key(pod: &str, namespace: Option<&str>) -> anyhow::Result<PodKey> {
    let text = match namespace {
        Some(_) if pod.contains('/') => bail!("the namespace is given twice: in \"{pod}\" and by -n"),
        Some(namespace) => format!("{namespace}/{pod}"),
        None => pod.to_owned(),
    };
    text.parse().map_err(anyhow::Error::msg)
}
