//! The programs that a cluster consists of (Kubernetes, etcd, containerd, the CNI plugins), helm, istiod, and SPIRE's server.
//! Each is built from a Go module of test tools below `tests/tools`, which pins its version and the versions of all that it
//! imports.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// A Go module of test tools: the programs that its `tool` lines name are built together.
#[derive(Debug)]
pub struct GoModule {
    /// The name of its folder below `tests/tools`.
    pub name: &'static str,
    /// The programs that it builds.
    pub programs: &'static [&'static str],
    /// The module whose version is the programs' version.
    source: &'static str,
    /// What the linker writes that version into (`-X VARIABLE=VALUE`).
    stamps: &'static [(&'static str, Stamp)],
    /// A program that its package's folder names otherwise: that name, and the program's.
    rename: Option<(&'static str, &'static str)>,
    /// The folder of its programs below [`folder`], if it is not that folder itself.
    below: Option<&'static str>,
    /// Whether it contains C code.
    c: bool,
}

/// A part of a version such as `v1.37.2`.
#[derive(Debug, Clone, Copy)]
enum Stamp {
    Whole,
    Major,
    Minor,
}

impl GoModule {
    /// All modules, the quickest to build first.
    pub const ALL: [Self; 7] = [
        Self {
            name: "cni",
            programs: &["bridge", "host-local", "loopback", "portmap", "ptp"],
            source: "github.com/containernetworking/plugins",
            stamps: &[(
                "github.com/containernetworking/plugins/pkg/utils/buildversion.BuildVersion",
                Stamp::Whole,
            )],
            rename: None,
            below: None,
            c: false,
        },
        Self {
            name: "etcd",
            programs: &["etcd"],
            source: "go.etcd.io/etcd/server/v3",
            stamps: &[],
            rename: Some(("server", "etcd")),
            below: None,
            c: false,
        },
        Self {
            name: "containerd",
            programs: &["containerd", "containerd-shim-runc-v2", "ctr"],
            source: "github.com/containerd/containerd/v2",
            stamps: &[(
                "github.com/containerd/containerd/v2/version.Version",
                Stamp::Whole,
            )],
            rename: None,
            below: None,
            c: false,
        },
        Self {
            name: "helm",
            programs: &["helm"],
            source: "helm.sh/helm/v4",
            stamps: &[("helm.sh/helm/v4/internal/version.version", Stamp::Whole)],
            rename: None,
            below: None,
            c: false,
        },
        Self {
            name: "istio",
            programs: &["pilot-discovery"],
            source: "istio.io/istio",
            stamps: &[],
            rename: None,
            below: None,
            c: false,
        },
        Self {
            name: "spire",
            programs: &["spire-server"],
            source: "github.com/spiffe/spire",
            stamps: &[],
            rename: None,
            below: None,
            // SQLite.
            c: true,
        },
        Self::KUBERNETES,
    ];

    const KUBERNETES: Self = Self {
        name: "kubernetes",
        programs: &[
            "kube-apiserver",
            "kube-controller-manager",
            "kube-proxy",
            "kube-scheduler",
            "kubectl",
            "kubelet",
        ],
        source: "k8s.io/kubernetes",
        // Without these, the API server calls itself v0.0.0, which its clients do not accept.
        stamps: &[
            ("k8s.io/component-base/version.gitVersion", Stamp::Whole),
            ("k8s.io/component-base/version.gitMajor", Stamp::Major),
            ("k8s.io/component-base/version.gitMinor", Stamp::Minor),
        ],
        rename: None,
        below: None,
        c: false,
    };

    /// The environment variable with the minor version of the Kubernetes to start, if not the newest.
    pub const VERSION: &str = "KUBE_VERSION";

    /// Older versions of Kubernetes that the cluster tests also run on, down to the oldest that is supported upstream.
    pub const OLDER: &'static [Self] = &[Self {
        name: "kubernetes-1.35",
        below: Some("1.35"),
        ..Self::KUBERNETES
    }];

    /// The older Kubernetes of a minor version, such as `1.35`.
    pub fn older(version: &str) -> Option<&'static Self> {
        Self::OLDER
            .iter()
            .find(|module| module.below == Some(version))
    }

    /// Whether its programs are built from the versions that its `go.mod` and `go.sum` in `tools` name.
    ///
    /// # Errors
    /// If the module's files cannot be read.
    pub fn is_current(&self, tools: &Path) -> Result<bool> {
        let built = fs::read_to_string(self.key_file()).unwrap_or_default();
        let complete = self
            .programs
            .iter()
            .all(|name| self.program(name).is_file());
        Ok(complete && built == self.key(tools)?)
    }

    /// Builds its programs with `go`, in place of older ones. The folder `tools` holds the module's folder.
    ///
    /// # Errors
    /// If a module cannot be downloaded, or a program does not compile.
    pub fn build(&self, tools: &Path, go: &Path) -> Result<()> {
        let draft = folder().join(format!(".{}.draft", self.name));
        remove_folder(&draft)?;
        for path in [&draft, &self.folder()] {
            fs::create_dir_all(path).with_context(|| format!("creating {}", path.display()))?;
        }
        let key = self.key(tools)?;
        let status = Command::new(go)
            .current_dir(tools.join(self.name))
            .args(["install", "-trimpath", "-ldflags"])
            .arg(self.linker_flags(&key)?)
            .arg("tool")
            .env("GOBIN", &draft)
            .env("GOWORK", "off")
            .env("CGO_ENABLED", if self.c { "1" } else { "0" })
            .status()
            .with_context(|| format!("running {}", go.display()))?;
        if !status.success() {
            bail!("`go install tool` in tests/tools/{}: {status}", self.name);
        }
        if let Some((from, to)) = self.rename {
            rename(&draft.join(from), &draft.join(to))?;
        }
        for name in self.programs {
            rename(&draft.join(name), &self.program(name))?;
        }
        remove_folder(&draft)?;
        // Last: an interrupted build is repeated.
        let path = self.key_file();
        fs::write(&path, key).with_context(|| format!("writing {}", path.display()))
    }

    /// What determines the programs: two builds with the same key give the same programs.
    fn key(&self, tools: &Path) -> Result<String> {
        let read = |name: &str| {
            let path = tools.join(self.name).join(name);
            fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
        };
        Ok(read("go.mod")? + &read("go.sum")?)
    }

    /// The minor version of an older Kubernetes, such as `1.35`.
    pub fn minor_version(&self) -> &'static str {
        self.below.unwrap_or_default()
    }

    /// The folder of its programs.
    pub fn folder(&self) -> PathBuf {
        self.below.map_or_else(folder, |below| folder().join(below))
    }

    fn program(&self, name: &str) -> PathBuf {
        self.folder().join(name)
    }

    fn key_file(&self) -> PathBuf {
        folder().join(format!(".{}.built-from", self.name))
    }

    fn linker_flags(&self, go_mod: &str) -> Result<String> {
        let version = version_of(go_mod, self.source)
            .with_context(|| format!("no version of {} in go.mod", self.source))?;
        let mut numbers = version.trim_start_matches('v').split('.');
        let (major, minor) = (numbers.next(), numbers.next());
        let mut flags = "-s -w".to_owned();
        for (variable, stamp) in self.stamps {
            let value = match stamp {
                Stamp::Whole => Some(version),
                Stamp::Major => major,
                Stamp::Minor => minor,
            };
            let value = value.with_context(|| format!("{version} has no such part"))?;
            flags += &format!(" -X {variable}={value}");
        }
        Ok(flags)
    }
}

/// The version of a module that a `go.mod` requires.
fn version_of<'a>(go_mod: &'a str, module: &str) -> Option<&'a str> {
    go_mod.lines().find_map(|line| {
        let mut words = line.trim_start_matches("require ").split_whitespace();
        let found = words.next() == Some(module);
        words.next().filter(|word| found && word.starts_with('v'))
    })
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).with_context(|| format!("moving {} to {}", from.display(), to.display()))
}

fn remove_folder(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// The folder of the built programs: `$KUBE`, or `/opt/kube`.
pub fn folder() -> PathBuf {
    env::var_os("KUBE").map_or_else(|| DEFAULT_FOLDER.into(), PathBuf::from)
}

/// The path of a built program. Those of Kubernetes are of the version that [`GoModule::VERSION`] names, if it is set.
pub(crate) fn program(name: &str) -> PathBuf {
    let version = env::var(GoModule::VERSION).unwrap_or_default();
    let older = GoModule::older(&version).filter(|module| module.programs.contains(&name));
    older.map_or_else(|| folder().join(name), |module| module.program(name))
}

/// `$PATH` with the folder of the built programs in front.
pub(crate) fn path_variable() -> Result<OsString> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::join_paths([folder()].into_iter().chain(env::split_paths(&path)))
        .context("adding the folder of the built programs to PATH")
}

/// Why the first of these programs that is missing is missing: built ones by `cargo xtask kubernetes`, the others
/// installed by it.
pub(crate) fn first_missing(built: &[&str], installed: &[&str]) -> Option<String> {
    let unbuilt = built.iter().map(|name| program(name));
    if let Some(path) = unbuilt.into_iter().find(|path| !path.is_file()) {
        return Some(format!(
            "{} is missing: `cargo xtask kubernetes` builds it with Go, which https://go.dev/dl has",
            path.display()
        ));
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let found = |name: &str| env::split_paths(&path).any(|folder| folder.join(name).is_file());
    installed
        .iter()
        .find(|name| !found(name))
        .map(|name| format!("{name} is missing: `cargo xtask kubernetes` installs it"))
}

const DEFAULT_FOLDER: &str = "/opt/kube";

#[cfg(test)]
mod tests {
    use super::*;

    fn tools() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tools")
    }

    #[test]
    fn reads_required_version() {
        let go_mod = "module x\n\nreplace (\n\tk8s.io/kubernetes/a => k8s.io/a v0.1.0\n)\n\n\
                      require (\n\tk8s.io/kubernetes v1.37.2 // indirect\n)\n";
        assert_eq!(version_of(go_mod, "k8s.io/kubernetes"), Some("v1.37.2"));
        assert_eq!(version_of(go_mod, "k8s.io/kube"), None);
        assert_eq!(
            version_of("require a.b/c v2.0.1\n", "a.b/c"),
            Some("v2.0.1")
        );
    }

    #[test]
    fn every_module_pins_its_version() {
        for module in GoModule::ALL.iter().chain(GoModule::OLDER) {
            let flags = module
                .key(&tools())
                .and_then(|key| module.linker_flags(&key));
            let flags = flags.unwrap_or_else(|error| panic!("{}: {error:#}", module.name));
            assert_eq!(
                flags.matches(" -X ").count(),
                module.stamps.len(),
                "{}: {flags}",
                module.name
            );
        }
    }

    #[test]
    fn tool_lines_name_every_program() {
        for module in GoModule::ALL.iter().chain(GoModule::OLDER) {
            let go_mod = fs::read_to_string(tools().join(module.name).join("go.mod")).unwrap();
            for name in module.programs {
                let name = module
                    .rename
                    .filter(|(_, to)| to == name)
                    .map_or(*name, |(from, _)| from);
                let named = go_mod.lines().any(|line| {
                    let path = line.trim().trim_start_matches("tool ");
                    // The last part of a path may be its module's major version.
                    path.trim_end_matches("/v3").ends_with(&format!("/{name}"))
                });
                assert!(named, "{}: no tool line for {name}", module.name);
            }
        }
    }
}
