//! Compiler options that keep this machine's folders out of what is compiled: the same sources, compilers and libraries
//! then give the same bytes in every folder.

use std::env;
use std::path::{Path, PathBuf};

/// A folder of this machine, and its name in what is compiled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Folder {
    path: PathBuf,
    name: &'static str,
}

/// The folders with sources: `workspace`, and cargo's own with the dependencies.
pub fn folders(workspace: &Path) -> Vec<Folder> {
    let cargo = env::var_os("CARGO_HOME").map(PathBuf::from).or_else(|| {
        let home = env::var_os("HOME")?;
        Some(Path::new(&home).join(".cargo"))
    });
    let named = |path, name| Folder { path, name };
    // Compilers take the last that fits: some keep cargo's folder in the workspace.
    let mut folders = vec![named(workspace.to_owned(), "/build")];
    folders.extend(cargo.map(|path| named(path, "/cargo")));
    folders
}

/// The option of rustc for each folder.
pub fn rust_options(folders: &[Folder]) -> Vec<String> {
    let options = folders.iter();
    options
        .map(|Folder { path, name }| format!("--remap-path-prefix={}={name}", path.display()))
        .collect()
}

/// The option of GCC and Clang for each folder.
pub fn c_options(folders: &[Folder]) -> Vec<String> {
    let options = folders.iter();
    options
        .map(|Folder { path, name }| format!("-ffile-prefix-map={}={name}", path.display()))
        .collect()
}

/// The first of these folders whose path is in a file's bytes.
pub fn mentioned<'a>(folders: &'a [Folder], bytes: &[u8]) -> Option<&'a Path> {
    let in_bytes = |path: &Path| {
        // With the separator: the path alone may be a word that means something else.
        let mut prefix = path.as_os_str().as_encoded_bytes().to_vec();
        prefix.push(b'/');
        bytes.windows(prefix.len()).any(|window| window == prefix)
    };
    let paths = folders.iter().map(|folder| &*folder.path);
    paths.into_iter().find(|path| in_bytes(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_found_in_bytes() {
        let folders = folders(Path::new("/somewhere/here"));
        let found = |text: &str| mentioned(&folders, text.as_bytes()).map(Path::to_owned);
        assert_eq!(found("a/somewhere/here/b"), Some("/somewhere/here".into()));
        assert_eq!(found("a/somewhere/here"), None);
        assert_eq!(found(""), None);
    }
}
