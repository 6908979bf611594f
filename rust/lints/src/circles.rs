//! Files of a crate that import each other.
//!
//! The graph has a node for each file of a crate's `src` and an arrow for each path that leads from one file
//! to an item of another. A path is followed through `use` declarations to the file that defines the item: a
//! re-export in a `mod.rs` is a door, not a room. Declaring a module (`mod x;`) is no arrow, nor is what
//! stands below `#[cfg(test)]`.
//!
//! Paths inside macros are not seen. An arrow can therefore be missing; none is invented.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use syn::{
    Attribute, File, Item, ItemMod, ItemUse, UseTree,
    visit::{self, Visit},
};

use crate::{is_test, rust_files};

/// A module's path in its crate; the root's is empty.
type Module = Vec<String>;
/// Most re-exports through which a path is followed.
const DEPTH: usize = 8;

/// Groups of files that import each other, each sorted, of a crate's `src`.
///
/// # Errors
/// When a file cannot be read or parsed.
pub fn of_crate(source: &Path) -> io::Result<Vec<Vec<String>>> {
    let mut files = BTreeMap::new();
    for path in rust_files(source)?.into_iter().filter(|path| !is_test(path)) {
        let text = fs::read_to_string(&path)?;
        let relative = path.strip_prefix(source).unwrap_or(&path).to_owned();
        let parsed = syn::parse_file(&text)
            .map_err(|error| io::Error::other(format!("{}: {error}", path.display())))?;
        files.insert(relative, parsed);
    }
    Ok(circles(&files))
}

fn circles(files: &BTreeMap<PathBuf, File>) -> Vec<Vec<String>> {
    let mut modules = BTreeMap::new();
    for (path, file) in files {
        // The program beside a library is a crate of its own, which nothing imports.
        if path != Path::new("main.rs") || !files.contains_key(Path::new("lib.rs")) {
            modules.insert(module_of(path), Names::of(file));
        }
    }
    let arrows: BTreeMap<&Module, BTreeSet<Module>> = modules
        .iter()
        .map(|(module, names)| {
            let targets = names.paths.iter().filter_map(|path| definer(&modules, module, path, DEPTH));
            (module, targets.filter(|target| target != module).collect())
        })
        .collect();
    components(&arrows)
}

/// `vmm/qemu/args.rs` and `vmm/qemu/args/mod.rs` are `vmm::qemu::args`.
fn module_of(path: &Path) -> Module {
    let mut parts: Module = path
        .with_extension("")
        .components()
        .map(|part| part.as_os_str().to_string_lossy().into_owned())
        .collect();
    if parts.last().is_some_and(|last| matches!(last.as_str(), "mod" | "lib" | "main")) {
        parts.pop();
    }
    parts
}

/// Names that a file knows from elsewhere, and paths that it follows.
#[derive(Default)]
struct Names {
    /// Names that `use` binds, with their paths.
    bound: BTreeMap<String, Vec<String>>,
    paths: BTreeSet<Vec<String>>,
}

impl Names {
    fn of(file: &File) -> Self {
        let mut names = Self::default();
        for item in &file.items {
            if let Item::Use(item) = item
                && !only_in_tests(&item.attrs)
            {
                flatten(&item.tree, &mut Vec::new(), &mut |name, path| {
                    names.bound.insert(name, path);
                });
            }
        }
        names.visit_file(file);
        names
    }
}

impl Visit<'_> for Names {
    fn visit_item(&mut self, item: &Item) {
        if !attributes(item).is_some_and(only_in_tests) {
            visit::visit_item(self, item);
        }
    }

    fn visit_item_mod(&mut self, item: &ItemMod) {
        if !only_in_tests(&item.attrs) {
            visit::visit_item_mod(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &ItemUse) {
        // A re-export is followed by who imports it, and is no use of its own.
        if matches!(item.vis, syn::Visibility::Inherited) {
            flatten(&item.tree, &mut Vec::new(), &mut |_, path| {
                self.paths.insert(path);
            });
        }
    }

    fn visit_path(&mut self, path: &syn::Path) {
        if path.segments.len() > 1 {
            self.paths.insert(path.segments.iter().map(|segment| segment.ident.to_string()).collect());
        }
        visit::visit_path(self, path);
    }
}

fn attributes(item: &Item) -> Option<&[Attribute]> {
    match item {
        Item::Fn(item) => Some(&item.attrs),
        Item::Impl(item) => Some(&item.attrs),
        Item::Struct(item) => Some(&item.attrs),
        Item::Use(item) => Some(&item.attrs),
        Item::Const(item) => Some(&item.attrs),
        _ => None,
    }
}

fn only_in_tests(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute.meta.require_list().is_ok_and(|list| list.tokens.to_string() == "test")
    })
}

fn flatten(tree: &UseTree, before: &mut Vec<String>, found: &mut impl FnMut(String, Vec<String>)) {
    match tree {
        UseTree::Path(path) => {
            before.push(path.ident.to_string());
            flatten(&path.tree, before, found);
            before.pop();
        }
        UseTree::Name(name) if name.ident == "self" => {
            found(before.last().cloned().unwrap_or_default(), before.clone());
        }
        UseTree::Name(name) => found(name.ident.to_string(), with(before, &name.ident.to_string())),
        UseTree::Rename(rename) => {
            found(rename.rename.to_string(), with(before, &rename.ident.to_string()));
        }
        UseTree::Glob(_) => found("*".into(), before.clone()),
        UseTree::Group(group) => group.items.iter().for_each(|tree| flatten(tree, before, found)),
    }
}

fn with(before: &[String], name: &str) -> Vec<String> {
    before.iter().cloned().chain([name.to_owned()]).collect()
}

/// The module in whose file the item at the end of a path is defined; `None` for what is not of this crate.
fn definer(
    modules: &BTreeMap<Module, Names>,
    from: &Module,
    path: &[String],
    depth: usize,
) -> Option<Module> {
    let (mut at, rest) = start(modules, from, path, depth)?;
    for (index, name) in rest.iter().enumerate() {
        let child = with(&at, name);
        if modules.contains_key(&child) {
            at = child;
            continue;
        }
        let bound = modules.get(&at).and_then(|names| names.bound.get(name));
        let Some(bound) = bound.filter(|_| depth > 0 && at != *from) else { return Some(at) };
        let more = rest.get(index + 1..).unwrap_or_default();
        let whole: Vec<String> = bound.iter().chain(more).cloned().collect();
        return definer(modules, &at, &whole, depth - 1);
    }
    Some(at)
}

/// The module that a path starts at, and what is left of the path.
fn start<'a>(
    modules: &BTreeMap<Module, Names>,
    from: &Module,
    path: &'a [String],
    depth: usize,
) -> Option<(Module, &'a [String])> {
    let (first, rest) = path.split_first()?;
    match first.as_str() {
        "crate" => Some((Module::new(), rest)),
        "self" => Some((from.clone(), rest)),
        "super" => {
            let mut at = from.clone();
            at.pop();
            let mut rest = rest;
            while let Some(("super", more)) = rest.split_first().map(|(name, more)| (name.as_str(), more)) {
                at.pop();
                rest = more;
            }
            Some((at, rest))
        }
        name if modules.contains_key(&with(from, name)) => Some((with(from, name), rest)),
        name => {
            let bound = modules.get(from)?.bound.get(name).filter(|bound| depth > 0 && *bound != path)?;
            // What a `use` of the file binds may be a module.
            let at = definer(modules, from, bound, depth - 1)?;
            let is_module = at.last().is_some_and(|last| Some(last) == bound.last());
            is_module.then_some((at, rest))
        }
    }
}

/// Strongly connected components of more than one node, by names of modules.
fn components(arrows: &BTreeMap<&Module, BTreeSet<Module>>) -> Vec<Vec<String>> {
    let reach: BTreeMap<&Module, BTreeSet<&Module>> =
        arrows.keys().map(|module| (*module, reachable(arrows, module))).collect();
    let mut found = BTreeSet::new();
    for (module, targets) in &reach {
        let mut group: Vec<String> = targets
            .iter()
            .filter(|other| **other != *module && reach.get(*other).is_some_and(|back| back.contains(module)))
            .map(|other| name(other))
            .collect();
        if !group.is_empty() {
            group.push(name(module));
            group.sort();
            found.insert(group);
        }
    }
    found.into_iter().collect()
}

fn reachable<'a>(arrows: &'a BTreeMap<&Module, BTreeSet<Module>>, from: &Module) -> BTreeSet<&'a Module> {
    let mut seen = BTreeSet::new();
    let mut next: Vec<&Module> = arrows.get(from).into_iter().flatten().collect();
    while let Some(module) = next.pop() {
        if seen.insert(module) {
            next.extend(arrows.get(module).into_iter().flatten());
        }
    }
    seen
}

fn name(module: &Module) -> String {
    if module.is_empty() { "crate".into() } else { module.join("::") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(files: &[(&str, &str)]) -> Vec<Vec<String>> {
        let files = files.iter().map(|(path, text)| (PathBuf::from(path), syn::parse_file(text).unwrap()));
        circles(&files.collect())
    }

    #[test]
    fn files_that_use_each_other_are_a_circle() {
        let lib = "mod a; mod b; mod c;";
        let found = of(&[
            ("lib.rs", lib),
            ("a.rs", "use crate::b::B; pub struct A;"),
            ("b.rs", "pub struct B(super::a::A);"),
            ("c.rs", "use crate::a::A;"),
        ]);
        assert_eq!(found, [["a", "b"]]);
        let found = of(&[("lib.rs", lib), ("a.rs", "use super::b::f;"), ("b.rs", "fn f() {}"), ("c.rs", "")]);
        assert!(found.is_empty(), "{found:?}");
    }

    #[test]
    fn a_child_that_uses_its_parents_items_is_one_with_a_parent_that_uses_it() {
        let parent = "mod child; pub struct Kind; fn f() { child::go(); }";
        let found =
            of(&[("lib.rs", "mod a;"), ("a/mod.rs", parent), ("a/child.rs", "fn go(_: super::Kind) {}")]);
        assert_eq!(found, [["a", "a::child"]]);
    }

    #[test]
    fn a_re_export_is_a_door() {
        // `two` comes to `one` through the parent, which itself uses neither.
        let found = of(&[
            ("lib.rs", "mod a;"),
            ("a/mod.rs", "mod one; mod two; pub use self::one::One;"),
            ("a/one.rs", "pub struct One;"),
            ("a/two.rs", "use super::One;"),
        ]);
        assert!(found.is_empty(), "{found:?}");
        let found = of(&[
            ("lib.rs", "mod a;"),
            ("a/mod.rs", "mod one; mod two; pub use self::one::One;"),
            ("a/one.rs", "use super::two::Two; pub struct One;"),
            ("a/two.rs", "use super::One; pub struct Two;"),
        ]);
        assert_eq!(found, [["a::one", "a::two"]]);
    }

    #[test]
    fn tests_and_other_crates_do_not_count() {
        let a = "use std::io; use tokio::b; pub struct A; #[cfg(test)] mod tests { use crate::b::B; }";
        let found = of(&[("lib.rs", "mod a; mod b;"), ("a.rs", a), ("b.rs", "use crate::a::A; struct B;")]);
        assert!(found.is_empty(), "{found:?}");
    }

    #[test]
    fn a_module_that_is_bound_by_a_use_is_followed() {
        let found = of(&[
            ("lib.rs", "mod a; mod b;"),
            ("a.rs", "use super::b; fn f() { b::g(); }"),
            ("b.rs", "pub fn g() { crate::a::f(); }"),
        ]);
        assert_eq!(found, [["a", "b"]]);
    }
}
