//! `#[derive(CmdLineParamSet)]`.

use proc_macro2::TokenStream;
use quote::{quote, quote_spanned};
use syn::spanned::Spanned;
use syn::{DeriveInput, Error, Field, Ident, LitStr, Path, Result, Type};

use crate::common::{bare, bound, default_crate, inside, kebab, name, named_fields, set};

const DERIVE: &str = "CmdLineParamSet";

/// Types that print as one value.
const SCALARS: [&str; 20] = [
    "String", "str", "u8", "u16", "u32", "u64", "u128", "usize", "i8", "i16", "i32", "i64", "i128", "isize",
    "f8", "f16", "f32", "f64", "f128", "char",
];

/// Printed form of a field.
enum Form<'a> {
    Flag,
    Value,
    OptionalValue,
    Values,
    Delegate(&'a Type),
    OptionalDelegate(&'a Type),
    Delegates(&'a Type),
}

pub(crate) fn derive(input: &DeriveInput) -> Result<TokenStream> {
    let fields = named_fields(input, DERIVE)?;
    let krate = krate(input)?;
    let mut statements = Vec::new();
    let mut delegates = Vec::new();
    for field in fields {
        let Some(ident) = &field.ident else { continue };
        let Some(key) = key(field)? else { continue };
        let form = form(&field.ty);
        if let Form::Delegate(ty) | Form::OptionalDelegate(ty) | Form::Delegates(ty) = form {
            if let Key::Given(key) = key {
                let message = "has no effect: a field of this type prints under its own names";
                return Err(Error::new_spanned(key, message));
            }
            delegates.push(ty);
        }
        statements.push(statement(ident, &field.ty, &key.into_literal(ident), &form, &krate));
    }
    let generics = bound(&input.generics, &delegates, &quote!(#krate::param::ToCmdLineParams));
    let (impl_generics, ty_generics, where_clause) = generics.split_for_impl();
    let ident = &input.ident;
    Ok(quote! {
        #[automatically_derived]
        impl #impl_generics #krate::param::ToCmdLineParams for #ident #ty_generics #where_clause {
            #[allow(unused_mut, unused_variables)]
            fn to_cmdline_params(&self, hyphen: &str) -> ::std::vec::Vec<::std::string::String> {
                let mut __arguments = ::std::vec::Vec::new();
                #(#statements)*
                __arguments
            }
        }
    })
}

fn krate(input: &DeriveInput) -> Result<Path> {
    let mut krate = None;
    for attribute in input.attrs.iter().filter(|a| a.path().is_ident("param")) {
        attribute.parse_nested_meta(|meta| {
            if meta.path.is_ident("crate") {
                return set(&mut krate, &meta, meta.value()?.parse::<LitStr>()?.parse()?);
            }
            Err(meta.error("unknown item; known on a struct is `crate`"))
        })?;
    }
    Ok(krate.unwrap_or_else(default_crate))
}

/// Name of an option: from the attribute, or from the field.
enum Key {
    Given(LitStr),
    OfField,
}

impl Key {
    fn into_literal(self, ident: &Ident) -> LitStr {
        match self {
            Self::Given(key) => key,
            Self::OfField => kebab(ident),
        }
    }
}

/// Reads the field's attribute; nothing if the field is ignored.
fn key(field: &Field) -> Result<Option<Key>> {
    let (mut key, mut ignore) = (None, None);
    for attribute in field.attrs.iter().filter(|a| a.path().is_ident("param")) {
        attribute.parse_nested_meta(|meta| match meta.path.get_ident().map(Ident::to_string).as_deref() {
            Some("key") => set(&mut key, &meta, name(&meta)?),
            Some("ignore") => set(&mut ignore, &meta, ()),
            _ => Err(meta.error("unknown item; known are `key`, `ignore`")),
        })?;
    }
    match (key, ignore) {
        (Some(key), Some(())) => {
            Err(Error::new_spanned(key, "has no effect: the field is never printed, because of `ignore`"))
        }
        (None, Some(())) => Ok(None),
        (Some(key), None) => Ok(Some(Key::Given(key))),
        (None, None) => Ok(Some(Key::OfField)),
    }
}

fn form(ty: &Type) -> Form<'_> {
    if is_named(ty, &["bool"]) {
        Form::Flag
    } else if is_scalar(ty) {
        Form::Value
    } else if let Some(inner) = inside(ty, "Option") {
        if is_scalar(inner) { Form::OptionalValue } else { Form::OptionalDelegate(inner) }
    } else if let Some(inner) = inside(ty, "Vec") {
        if is_scalar(inner) { Form::Values } else { Form::Delegates(inner) }
    } else {
        Form::Delegate(ty)
    }
}

fn is_scalar(ty: &Type) -> bool {
    match bare(ty) {
        Type::Reference(reference) => is_named(&reference.elem, &["str"]),
        ty => is_named(ty, &SCALARS),
    }
}

/// Returns true if a type is written as one of the names, by itself or as a path into the standard library.
fn is_named(ty: &Type, names: &[&str]) -> bool {
    let Type::Path(path) = bare(ty) else { return false };
    let segments = &path.path.segments;
    let standard = segments.len() == 1
        || segments.first().is_some_and(|s| ["std", "core", "alloc"].iter().any(|name| s.ident == name));
    path.qself.is_none()
        && standard
        && segments.last().is_some_and(|s| s.arguments.is_none() && names.iter().any(|name| s.ident == name))
}

/// The statement that adds a field's arguments to the list.
fn statement(ident: &Ident, ty: &Type, key: &LitStr, form: &Form<'_>, krate: &Path) -> TokenStream {
    let option = quote!(__arguments.push(::std::format!("{}{}", hyphen, #key)););
    let text = quote!(::std::string::ToString::to_string);
    // At the type's place, so that a type that prints nothing is an error there.
    let value = Ident::new("__value", ty.span());
    let method = quote_spanned!(ty.span()=> to_cmdline_params);
    let delegate = quote!(#krate::param::ToCmdLineParams::#method);
    match form {
        Form::Flag => quote!(if self.#ident { #option }),
        Form::Value => quote!(#option __arguments.push(#text(&self.#ident));),
        Form::OptionalValue => quote! {
            if let ::std::option::Option::Some(#value) = &self.#ident {
                #option
                __arguments.push(#text(#value));
            }
        },
        Form::Values => quote! {
            if !self.#ident.is_empty() {
                #option
                let __values: ::std::vec::Vec<::std::string::String> = self.#ident.iter().map(#text).collect();
                __arguments.push(__values.join(","));
            }
        },
        Form::Delegate(_) => quote! {
            let #value = &self.#ident;
            __arguments.extend(#delegate(#value, hyphen));
        },
        Form::OptionalDelegate(_) => quote! {
            if let ::std::option::Option::Some(#value) = &self.#ident {
                __arguments.extend(#delegate(#value, hyphen));
            }
        },
        Form::Delegates(_) => quote! {
            for #value in &self.#ident {
                __arguments.extend(#delegate(#value, hyphen));
            }
        },
    }
}
