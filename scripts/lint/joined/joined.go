// Package joined finds calls with a side effect that stand beside an error, as in
//
//	return errors.Join(err, msg.Ack())
//
// Go evaluates the call whatever err is, so the message is acknowledged although something failed.
package joined

import (
	"go/ast"
	"go/types"
	"strings"

	"golang.org/x/tools/go/analysis"
	"golang.org/x/tools/go/analysis/passes/inspect"
	"golang.org/x/tools/go/ast/inspector"
	"golang.org/x/tools/go/types/typeutil"
)

// Analyzer reports such calls. Calls that clean up (Close, Stop, ...) belong beside an error and are not reported.
var Analyzer = &analysis.Analyzer{
	Name:     "joined",
	Doc:      "report calls with a side effect as an argument beside an error",
	Requires: []*analysis.Analyzer{inspect.Analyzer},
	Run:      run,
}

// cleanup begins the names of functions that are called whatever happened before.
var cleanup = []string{
	"close", "stop", "shutdown", "destroy", "rollback", "release", "remove", "cancel", "unset", "unlock", "unsubscribe",
	"drain", "end", "wait", "kill", "flush",
}

// pure are functions of the standard library whose errors say something and do nothing.
var pure = map[string]bool{
	"errors.New": true, "errors.Join": true, "errors.Unwrap": true, "fmt.Errorf": true, "context.Cause": true,
	"(context.Context).Err": true, "(error).Error": true,
}

func run(pass *analysis.Pass) (any, error) {
	nodes := pass.ResultOf[inspect.Analyzer].(*inspector.Inspector)
	nodes.Preorder([]ast.Node{(*ast.CallExpr)(nil)}, func(n ast.Node) {
		call := n.(*ast.CallExpr)
		if f := typeutil.StaticCallee(pass.TypesInfo, call); f == nil ||
			f.FullName() != "errors.Join" && f.FullName() != "fmt.Errorf" {
			return
		}
		if !besideError(pass, call) {
			return
		}
		for _, arg := range call.Args {
			effect, ok := ast.Unparen(arg).(*ast.CallExpr)
			if ok && isError(pass.TypesInfo.TypeOf(effect)) && !harmless(pass, effect) {
				pass.Reportf(effect.Pos(), "%s is called although the error beside it may be set", types.ExprString(effect.Fun))
			}
		}
	})
	return nil, nil
}

// besideError reports whether an argument is an error that was made before the call.
func besideError(pass *analysis.Pass, call *ast.CallExpr) bool {
	for _, arg := range call.Args {
		switch ast.Unparen(arg).(type) {
		case *ast.Ident, *ast.SelectorExpr, *ast.IndexExpr:
			if v := pass.TypesInfo.Types[arg]; !v.IsNil() && isError(v.Type) && !isSentinel(pass, arg) {
				return true
			}
		}
	}
	return false
}

// isSentinel reports whether the expression is an error of a package, such as io.EOF, rather than what a call returned.
func isSentinel(pass *analysis.Pass, e ast.Expr) bool {
	var id *ast.Ident
	switch e := ast.Unparen(e).(type) {
	case *ast.Ident:
		id = e
	case *ast.SelectorExpr:
		id = e.Sel
	default:
		return false
	}
	v, ok := pass.TypesInfo.Uses[id].(*types.Var)
	return ok && v.Pkg() != nil && v.Parent() == v.Pkg().Scope()
}

func harmless(pass *analysis.Pass, call *ast.CallExpr) bool {
	callee := typeutil.Callee(pass.TypesInfo, call)
	if callee == nil {
		return false // a function value may do anything
	}
	if f, ok := callee.(*types.Func); ok && pure[f.FullName()] {
		return true
	}
	name := strings.ToLower(callee.Name())
	for _, prefix := range cleanup {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}

var errorType = types.Universe.Lookup("error").Type().Underlying().(*types.Interface)

func isError(t types.Type) bool {
	if t == nil {
		return false
	}
	if _, tuple := t.(*types.Tuple); tuple {
		return false
	}
	return types.Implements(t, errorType)
}
