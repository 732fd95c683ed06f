//! The shared libraries of a program. They are read from its headers: it is not run, so it may be of another architecture.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use lddtree::DependencyAnalyzer;

use crate::architecture::Architecture;

/// The files that `program` loads when it starts, its loader among them: their paths on this machine, by the paths where
/// the loader looks for them. None if it is statically linked or not an ELF file.
///
/// # Errors
/// If the program cannot be read, or a library is missing.
pub fn shared_libraries(
    program: &Path,
    architecture: Architecture,
) -> Result<BTreeMap<PathBuf, PathBuf>> {
    let mut magic = [0; 4];
    let read = File::open(program).and_then(|mut file| file.read(&mut magic));
    read.with_context(|| format!("reading {}", program.display()))?;
    if magic != *b"\x7fELF" {
        return Ok(BTreeMap::new());
    }
    let folders = architecture.library_folders();
    let cross = folders[1].clone();
    let analyzer = DependencyAnalyzer::default().library_paths(folders.to_vec());
    let tree = analyzer
        .analyze(program)
        .with_context(|| format!("reading the headers of {}", program.display()))?;
    let mut files = BTreeMap::new();
    for library in tree.libraries.values() {
        let Some(source) = &library.realpath else {
            bail!(
                "{} needs {}, which is not installed for {}",
                program.display(),
                library.name,
                architecture.name()
            );
        };
        // A loader does not know the folder of a cross compiler, but each loader searches /lib.
        let path = match library.path.strip_prefix(&cross) {
            Ok(name) => Path::new("/lib").join(name),
            Err(_) => library.path.clone(),
        };
        files.insert(path, source.clone());
    }
    if let Some(loader) = tree.interpreter {
        let name = Path::new(&loader).file_name().unwrap_or_default();
        let library = tree.libraries.get(&*name.to_string_lossy());
        let source = library
            .and_then(|library| library.realpath.clone())
            .with_context(|| format!("{}: its loader {loader} is missing", program.display()))?;
        files.insert(loader.into(), source);
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::env;
    use std::fs;
    use std::process::Command;

    #[test]
    fn agrees_with_the_loader() {
        let program = env::current_exe().unwrap();
        let found = shared_libraries(&program, Architecture::native().unwrap()).unwrap();
        let listed = Command::new("ldd").arg(&program).output().unwrap().stdout;
        let listed = String::from_utf8(listed).unwrap();
        // `libc.so.6 => /lib/… (0x…)` and `/lib64/ld-linux-… (0x…)`; the kernel's own vdso has no path.
        let mut listed: Vec<_> = listed
            .lines()
            .filter_map(|line| line.split(" (0x").next()?.split(' ').next_back())
            .map(str::trim)
            .filter(|path| path.starts_with('/'))
            .map(|path| fs::canonicalize(path).unwrap())
            .collect();
        let mut files: Vec<_> = found.values().cloned().collect();
        for paths in [&mut listed, &mut files] {
            paths.sort();
            paths.dedup();
        }
        assert!(!files.is_empty());
        assert_eq!(files, listed);
    }

    #[test]
    fn scripts_have_no_libraries() {
        let script = env::temp_dir().join(format!("libraries-{}", std::process::id()));
        fs::write(&script, "#!/bin/sh\n").unwrap();
        let native = Architecture::native().unwrap();
        let found = shared_libraries(&script, native);
        fs::remove_file(&script).unwrap();
        assert_eq!(found.unwrap(), BTreeMap::new());
        assert!(shared_libraries(&script, native).is_err());
    }
}
