//! `#[derive(CmdLineParams)]`.

use proc_macro2::TokenStream;
use quote::{format_ident, quote, quote_spanned};
use syn::punctuated::Punctuated;
use syn::spanned::Spanned;
use syn::{Attribute, DeriveInput, Error, Expr, Field, Ident, LitStr, Path, Result, Token, Type};

use crate::common::{bound, default_crate, inside, kebab, name, named_fields, refuse_attribute, set, text};

const DERIVE: &str = "CmdLineParams";

/// Content of `#[params(...)]`.
struct Options {
    names: Vec<LitStr>,
    krate: Path,
}

/// Content of one `#[property(...)]`.
#[derive(Default)]
struct Property {
    param: Option<LitStr>,
    key: Option<LitStr>,
    predicate: Option<Expr>,
    generator: Option<Path>,
    ignore_key: bool,
    ignore: bool,
}

pub(crate) fn derive(input: &DeriveInput) -> Result<TokenStream> {
    let fields = named_fields(input, DERIVE)?;
    refuse_attribute(
        &input.attrs,
        "property",
        "`property` belongs to a field; the struct's attribute is `params`",
    )?;
    let Options { names, krate } = options(input)?;
    let mut statements: Vec<Vec<TokenStream>> = names.iter().map(|_| Vec::new()).collect();
    let mut displayed = Vec::new();
    for field in fields {
        refuse_attribute(
            &field.attrs,
            "params",
            "`params` belongs to the struct; a field's attribute is `property`",
        )?;
        let Some(ident) = &field.ident else { continue };
        for (property, at) in properties(field, ident)? {
            let index = param_index(&property, &names, at)?;
            if property.ignore {
                continue;
            }
            if property.generator.is_none() {
                displayed.push(inside(&field.ty, "Option").unwrap_or(&field.ty));
            }
            let list = list_name(index);
            if let Some(statements) = statements.get_mut(index) {
                statements.push(statement(&property, ident, &field.ty, &krate, &list));
            }
        }
    }
    let unused = names.iter().zip(&statements).find(|(_, s)| s.is_empty()).filter(|_| names.len() > 1);
    if let Some((unused, _)) = unused {
        return Err(Error::new_spanned(unused, "no field has a property of this param"));
    }
    let generics = bound(&input.generics, &displayed, &quote!(::std::string::ToString));
    let (impl_generics, ty_generics, where_clause) = generics.split_for_impl();
    let (ident, lists): (_, Vec<_>) = (&input.ident, (0..names.len()).map(list_name).collect());
    Ok(quote! {
        #[automatically_derived]
        impl #impl_generics #krate::param::ToParams for #ident #ty_generics #where_clause {
            fn to_params(&self) -> ::std::vec::Vec<#krate::param::Param> {
                ::std::vec![#({
                    #[allow(unused_mut)]
                    let mut #lists: ::std::vec::Vec<#krate::param::Property> = ::std::vec::Vec::new();
                    #(#statements)*
                    #krate::param::Param::new(#names, #lists)
                }),*]
            }
        }
    })
}

fn list_name(index: usize) -> Ident {
    format_ident!("__properties_{}", index)
}

fn options(input: &DeriveInput) -> Result<Options> {
    let mut names: Vec<LitStr> = Vec::new();
    let mut krate = None;
    let mut attributes = input.attrs.iter().filter(|a| a.path().is_ident("params"));
    if let Some(attribute) = attributes.next() {
        let items = attribute.parse_args_with(Punctuated::<Item, Token![,]>::parse_terminated)?;
        if items.is_empty() {
            return Err(Error::new_spanned(attribute, "names no param"));
        }
        for item in items {
            match item {
                Item::Name(name) if name.value().is_empty() => {
                    return Err(Error::new_spanned(name, "must not be empty"));
                }
                Item::Name(name) if names.iter().any(|n| n.value() == name.value()) => {
                    return Err(Error::new_spanned(name, "this param is declared twice"));
                }
                Item::Name(name) => names.push(name),
                Item::Crate(token, _) if krate.is_some() => {
                    return Err(Error::new_spanned(token, "given twice"));
                }
                Item::Crate(_, path) => krate = Some(path),
            }
        }
    }
    if let Some(second) = attributes.next() {
        return Err(Error::new_spanned(
            second.path(),
            "a struct has one `params` attribute, which names all",
        ));
    }
    if names.is_empty() {
        names.push(kebab(&input.ident));
    }
    Ok(Options { names, krate: krate.unwrap_or_else(default_crate) })
}

/// One item of `#[params(...)]`.
enum Item {
    Name(LitStr),
    Crate(Token![crate], Path),
}

impl syn::parse::Parse for Item {
    fn parse(input: syn::parse::ParseStream<'_>) -> Result<Self> {
        if input.peek(LitStr) {
            return input.parse().map(Self::Name);
        }
        if input.peek(Token![crate]) {
            let token = input.parse()?;
            input.parse::<Token![=]>()?;
            return Ok(Self::Crate(token, input.parse::<LitStr>()?.parse()?));
        }
        Err(input.error("expected the name of a param in quotes, or `crate = \"path\"`"))
    }
}

/// The properties of a field, each with the tokens an error about it points at.
fn properties<'a>(field: &'a Field, ident: &'a Ident) -> Result<Vec<(Property, &'a dyn quote::ToTokens)>> {
    let attributes: Vec<_> = field.attrs.iter().filter(|a| a.path().is_ident("property")).collect();
    if attributes.is_empty() {
        return Ok(vec![(Property::default(), ident)]);
    }
    attributes.into_iter().map(|a| Ok((property(a)?, a as &dyn quote::ToTokens))).collect()
}

fn property(attribute: &Attribute) -> Result<Property> {
    let mut property = Property::default();
    let mut other_than_param = None;
    attribute.parse_nested_meta(|meta| {
        let Some(item) = meta.path.get_ident().map(Ident::to_string) else {
            return Err(unknown(&meta));
        };
        match item.as_str() {
            "param" => return set(&mut property.param, &meta, name(&meta)?),
            "key" => set(&mut property.key, &meta, name(&meta)?)?,
            "predicate" => set(&mut property.predicate, &meta, text(&meta)?.parse()?)?,
            "generator" => set(&mut property.generator, &meta, text(&meta)?.parse()?)?,
            "ignore_key" => property.ignore_key = true,
            "ignore" => {
                property.ignore = true;
                return Ok(());
            }
            _ => return Err(unknown(&meta)),
        }
        other_than_param.get_or_insert(meta.path.clone());
        Ok(())
    })?;
    match other_than_param {
        Some(item) if property.ignore => {
            Err(Error::new_spanned(item, "has no effect: the property is never printed, because of `ignore`"))
        }
        _ => Ok(property),
    }
}

fn unknown(meta: &syn::meta::ParseNestedMeta<'_>) -> Error {
    meta.error("unknown item; known are `param`, `key`, `predicate`, `generator`, `ignore_key`, `ignore`")
}

/// Index of the struct's param that the property belongs to.
fn param_index(property: &Property, names: &[LitStr], at: &dyn quote::ToTokens) -> Result<usize> {
    let listed = || names.iter().map(|n| format!("`{}`", n.value())).collect::<Vec<_>>().join(", ");
    match &property.param {
        Some(param) => names.iter().position(|n| n.value() == param.value()).ok_or_else(|| {
            Error::new_spanned(param, format!("this param is not declared; declared: {}", listed()))
        }),
        None if names.len() > 1 && !property.ignore => {
            let message = format!(
                "which of the params {} does it belong to? Say `#[property(param = \"...\")]` or `#[property(ignore)]`",
                listed()
            );
            Err(Error::new_spanned(at.to_token_stream(), message))
        }
        None => Ok(0),
    }
}

/// The statement that adds one property to its list.
fn statement(property: &Property, ident: &Ident, ty: &Type, krate: &Path, list: &Ident) -> TokenStream {
    let key = property.key.clone().unwrap_or_else(|| kebab(ident));
    let ignore_key = property.ignore_key;
    // The function has the type's place, so that a type that does not print is an error there. `self` keeps
    // its own: a type that comes out of a declarative macro has another hygiene.
    let to_string = quote_spanned!(ty.span()=> ::std::string::ToString::to_string);
    let value = |reference: TokenStream| match &property.generator {
        Some(generator) => quote!(#generator(#reference)),
        None => quote!(#to_string(#reference)),
    };
    let push =
        |value: TokenStream| quote!(#list.push(#krate::param::Property::new(#key, #value, #ignore_key)););
    let inner = Ident::new("__value", ty.span());
    let push = push(value(quote!(#inner)));
    let push = if inside(ty, "Option").is_some() {
        // Within the predicate, not instead of it: a predicate that is true of None must not panic.
        quote!(if let ::std::option::Option::Some(#inner) = &self.#ident { #push })
    } else {
        quote!(let #inner = &self.#ident; #push)
    };
    match &property.predicate {
        Some(predicate) => {
            // A variable, since an expression with a struct literal cannot stand after `if`.
            quote!({ let __wanted: bool = #predicate; if __wanted { #push } })
        }
        None => quote!({ #push }),
    }
}
